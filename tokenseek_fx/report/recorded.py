"""Build a ``Run`` from a recording and the figures of a training loop."""

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

#: Bars in the histogram of positions.
_BINS = 20
#: Kinds of saved tensors that a report shows separately; all others count as activations.
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
    """The run of a training loop. The caller sets its ``settings``, ``memory`` and ``graphs``.

    ``recording``: the selections of all steps. ``steps``: figures of each step, for example its loss; kept fractions
    and overlap are added from the recording. ``plain``: the steps of a run on all tokens. ``batches``: token ids, int64
    [B, T], of each step. ``decode``: a tokenizer, or a function from a list of ids to text. With ``batches`` and
    ``decode`` the report shows the first sequence of at most ``examples`` steps.

    Raises:
        ValueError: the number of ``steps`` or ``batches`` is not that of the recorded steps, or the shape of the ids
            is not that of the recorded scores.

    >>> rec = [Selection(torch.tensor([[0, 2]]), torch.zeros(1, 4))]
    >>> ids = torch.tensor([[72, 105, 33, 10]])
    >>> run = run_of(rec, [Step(1, loss=2.5)], batches=[ids], decode=lambda ids: bytes(ids).decode())
    >>> run.steps[0].kept, run.examples[0].tokens, run.examples[0].kept
    (0.5, ['H', 'i', '!', '\\n'], [0, 2])
    """
    for name, given in {"steps": steps, "batches": batches}.items():
        if given and len(given) != len(recording):
            raise ValueError(
                f"`{name}`: expected {len(recording)}, one for each recorded step, or none; got {len(given)}."
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
    """Sequence ``row`` of a batch with its kept tokens.

    ``ids``: token ids, int64 [B, T]. ``decode``: a tokenizer, or a function from a list of ids to text.

    Raises:
        ValueError: the shape of ``ids`` is not that of the recorded scores.
    """
    if ids.shape != selection.scores.shape:
        raise ValueError(
            f"Token ids have shape {list(ids.shape)}, but the recorded scores {list(selection.scores.shape)}. "
            "Pass the batch of the same step."
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
    """Bytes held between forward and backward, by part, for ``Run.memory``.

    Saved tensors are those that ``explain`` found; parameters, gradients and optimizer states are counted here.
    ``optimizer``: pass it after its first step, which creates its states.
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
    """For each step: the fields of ``Step`` that come from the recording."""
    for selection, overlap in zip(recording, stats.overlaps(recording), strict=True):
        some = selection.labelled is not None and bool(selection.labelled.any())
        yield {
            "kept": selection.indices.numel() / selection.scores.numel(),
            "labelled": stats.labelled_kept([selection]) if some else None,
            "overlap": overlap,
        }


def _spread(steps: int, examples: int) -> list[int]:
    """Indices of at most ``examples`` steps, evenly spaced, including the first and the last."""
    count = min(steps, examples)
    return [round(i * (steps - 1) / max(1, count - 1)) for i in range(count)]


def _row(values: Tensor | None, row: int) -> list[Any] | None:
    """A row as numbers; ``None`` for values that are not finite (padding)."""
    if values is None:
        return None
    if values.dtype == torch.bool:
        return values[row].tolist()
    return [x if ok else None for x, ok in zip(values[row].tolist(), values[row].isfinite().tolist(), strict=True)]
