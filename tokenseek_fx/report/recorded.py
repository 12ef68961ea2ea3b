"""Runs out of recordings: what a training loop knows, as the report reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import stats
from ..explanation import Explanation
from ..recording import Selection
from .run import Example, Run, Step

#: The bars of the histogram of positions.
_BINS = 20
#: Kinds of saved tensors that a report shows by themselves; all others are activations.
_KINDS = ("logits", "keys/values")

Decode = Callable[[list[int]], str]


def run_of(
    recording: Sequence[Selection],
    steps: Sequence[Step] = (),
    *,
    plain: Sequence[Step] = (),
    batches: Sequence[Tensor] = (),
    decode: Decode | Any = None,
    examples: int = 8,
    title: str = "tokenseek run",
) -> Run:
    """The run of a plain training loop. Its ``settings``, ``memory`` and ``graphs`` are set by whoever knows them.

    ``recording``: of all steps. ``steps``: what the loop knows of each, its loss for instance; the shares are added here.
    ``plain``: the steps of a run on all tokens. ``batches``: token ids [B, T] of every step, and ``decode``, a tokenizer or a
    function from ids to text: with both, the report shows the first sequence of at most ``examples`` steps.

    Raises ``ValueError`` where ``steps`` or ``batches`` are not as many as were recorded, or ids have another shape.

    >>> rec = [Selection(torch.tensor([[0, 2]]), torch.zeros(1, 4))]
    >>> ids = torch.tensor([[72, 105, 33, 10]])
    >>> run = run_of(rec, [Step(1, loss=2.5)], batches=[ids], decode=lambda ids: bytes(ids).decode())
    >>> run.steps[0].kept, run.examples[0].tokens, run.examples[0].kept
    (0.5, ['H', 'i', '!', '\\n'], [0, 2])
    """
    for name, given in {"steps": steps, "batches": batches}.items():
        if given and len(given) != len(recording):
            raise ValueError(
                f"{len(given)} {name} for {len(recording)} that were recorded: give one for each, or none."
            )
    steps = steps or [Step(i + 1) for i in range(len(recording))]
    shown = _spread(len(recording), examples) if batches and decode is not None else ()
    return Run(
        title,
        steps=[replace(step, **shares) for step, shares in zip(steps, _shares(recording), strict=True)],
        plain=list(plain),
        examples=[example_of(recording[i], batches[i], decode, step=steps[i].step) for i in shown],
        positions=stats.position_histogram(recording, _BINS).tolist(),
    )


def example_of(
    selection: Selection, ids: Tensor, decode: Decode | Any, *, step: int, row: int = 0, name: str | None = None
) -> Example:
    """What was kept of sequence ``row`` of a batch. ``ids``: [B, T] token ids. ``decode``: a tokenizer, or a function from ids to text.

    Raises ``ValueError`` where the ids have not the shape of what was recorded.
    """
    if ids.shape != selection.scores.shape:
        raise ValueError(
            f"Token ids of shape {list(ids.shape)} for a selection of {list(selection.scores.shape)} tokens: give the "
            "batch of the same step."
        )
    text = getattr(decode, "decode", decode)
    fields = ("scores", "attention", "gradient", "loss", "labelled")
    return Example(
        step=step,
        name=name or f"sequence {row + 1} of {len(ids)}",
        tokens=[text([i]) for i in ids[row].tolist()],
        kept=selection.indices[row].tolist(),
        **{field: _row(getattr(selection, field), row) for field in fields},
    )


def memory_of(
    explanation: Explanation, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, dict[str, int]]:
    """The split of memory between forward and backward, ``Run.memory``: bytes of what ``explain`` found to be saved, and of the rest.

    ``optimizer``: the bytes of its states are counted as they are, so give it after its first step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [state for each in optimizer.state.values() for state in each.values()] if optimizer else []
    always = {
        "parameters": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": _bytes(trained),
        "optimizer": _bytes(states),
    }
    ways = {"tokenseek": explanation.rewritten, "all tokens": explanation.plain}
    return {way: {**always, **_by_part(audit.by_kind())} for way, audit in ways.items()}


def _bytes(values: Iterable[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, Tensor))


def _by_part(saved: Mapping[str, int]) -> dict[str, int]:
    parts = {kind: saved.get(kind, 0) for kind in _KINDS}
    return {"activations": sum(saved.values()) - sum(parts.values()), **parts}


def _shares(recording: Sequence[Selection]) -> Iterator[dict[str, float | None]]:
    """Fields of ``Step`` that a recording tells."""
    for selection, overlap in zip(recording, stats.overlaps(recording), strict=True):
        some = selection.labelled is not None and bool(selection.labelled.any())
        yield {
            "kept": selection.indices.numel() / selection.scores.numel(),
            "labelled": stats.labelled_kept([selection]) if some else None,
            "overlap": overlap,
        }


def _spread(steps: int, examples: int) -> list[int]:
    """At most ``examples`` steps, the first and the last among them, at equal distances."""
    count = min(steps, examples)
    return [round(i * (steps - 1) / max(1, count - 1)) for i in range(count)]


def _row(values: Tensor | None, row: int) -> list[Any] | None:
    """A row as numbers; ``None`` for what is not finite (padding)."""
    if values is None:
        return None
    if values.dtype == torch.bool:
        return values[row].tolist()
    return [x if ok else None for x, ok in zip(values[row].tolist(), values[row].isfinite().tolist(), strict=True)]
