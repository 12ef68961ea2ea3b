"""Runs out of recordings: what a training loop knows, as the report reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import stats
from ..estimate import Estimate
from ..recording import Selection
from .run import Example, Run, Step

#: The bars of the histogram of positions.
_BINS = 20
#: Kinds of ``StepMemory.saved`` that a report shows by themselves; all others are activations.
_KINDS = ("logits", "keys/values")

Decode = Callable[[list[int]], str]


def run_of(
    recording: Sequence[Selection],
    *,
    losses: Sequence[float] = (),
    plain: Sequence[float] = (),
    seconds: Sequence[float] = (),
    batches: Sequence[Tensor] = (),
    decode: Decode | Any = None,
    examples: int = 8,
    title: str = "tokenseek run",
) -> Run:
    """The run of a plain training loop; ``memory``, ``graphs`` and ``settings`` of it are set by whoever knows them.

    ``recording``: of every step. ``losses``, ``seconds``: a number for every step; ``plain``: the losses of a run on all tokens.
    ``batches``: token ids [B, T] of every step, and ``decode``, a tokenizer or a function from ids to text: with both, the report
    shows the first sequence of at most ``examples`` steps. What is not given is left out.

    Raises ``ValueError`` where there are not as many as steps, or the ids have not the shape of what was recorded.

    >>> rec = [Selection(torch.tensor([[0, 2]]), torch.zeros(1, 4))]
    >>> run = run_of(rec, losses=[2.5], batches=[torch.tensor([[72, 105, 33, 10]])], decode=lambda ids: bytes(ids).decode())
    >>> run.steps[0].kept, run.examples[0].tokens, run.examples[0].kept
    (0.5, ['H', 'i', '!', '\\n'], [0, 2])
    """
    for name, each in {"losses": losses, "seconds": seconds, "batches": batches}.items():
        if each and len(each) != len(recording):
            raise ValueError(
                f"{len(each)} {name} for a recording of {len(recording)} steps: give one for each, or none."
            )
    overlaps = stats.overlaps(recording)
    return Run(
        title,
        steps=[
            Step(i + 1, _at(losses, i), _at(seconds, i), *_shares(selection), overlap=overlaps[i])
            for i, selection in enumerate(recording)
        ],
        plain=[Step(i + 1, float(loss)) for i, loss in enumerate(plain)],
        examples=[
            example_of(recording[i], batches[i], decode, step=i + 1)
            for i in (_spread(len(recording), examples) if batches and decode is not None else ())
        ],
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


def memory_of(estimate: Estimate) -> dict[str, dict[str, int]]:
    """The split of memory, ``Run.memory``, of an estimate: bytes held between forward and backward, with gradients and optimizer."""
    always = {name: getattr(estimate, name) for name in ("parameters", "gradients", "optimizer")}
    ways = {"tokenseek": estimate.step} | ({"all tokens": estimate.plain} if estimate.plain else {})
    return {way: {**always, **_by_part(step.saved)} for way, step in ways.items()}


def _by_part(saved: Any) -> dict[str, int]:
    parts = {kind: saved.get(kind, 0) for kind in _KINDS}
    return {"activations": sum(saved.values()) - sum(parts.values()), **parts}


def _shares(selection: Selection) -> tuple[float, float | None]:
    """Share of the tokens kept, of the labelled tokens kept (``None``: there are none, or they are not known)."""
    labelled = selection.labelled
    some = labelled is not None and bool(labelled.any())
    return selection.indices.numel() / selection.scores.numel(), stats.labelled_kept([selection]) if some else None


def _at(values: Sequence[float], i: int) -> float | None:
    return float(values[i]) if values else None


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
