"""Figures of a recording: how much was kept, where in the sequence, and the overlap of selections.

An undefined figure (its input was not recorded, or it would be 0 / 0) raises a ``ValueError`` that says what to record,
rather than return NaN, which averages would hide. ``summary`` omits such figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recording import Selection

_BARS = "▁▂▃▄▅▆▇█"
_SAME_BATCHES = "Record both over the same batches in the same order (a data loader with the same seed)."
#: For a field of ``Selection``: how to have it recorded.
_REMEDIES = {
    "labelled": "Compute a loss over tokens in the compiled model, and keep fewer than all tokens.",
    "gradient": 'Record with a scorer that computes it: "tokenseek" or "gradient".',
    "loss": 'Record with a scorer that computes it: "tokenseek", "gradient" or "loss".',
    "instances": "Pass token ids [B, T] to the compiled model: they identify sequences.",
}


def labelled_kept(recording: Sequence[Selection]) -> float:
    """Fraction of the labelled tokens that were kept, over all steps together; 0 to 1.

    Raises:
        ValueError: labels were not recorded, or no token has one.

    >>> labelled = torch.tensor([[False, True, True, True]])
    >>> first_half = Selection(torch.tensor([[0, 1]]), torch.zeros(1, 4), labelled=labelled)
    >>> round(labelled_kept([first_half]), 3)
    0.333
    """
    return _share_kept(recording, "labelled")


def gradient_kept(recording: Sequence[Selection]) -> float:
    """Fraction of the gradient (I2, summed over all tokens and steps) at kept tokens; 0 to 1.

    Raises:
        ValueError: the scorer did not compute the gradient, or it is 0 for all tokens.

    >>> gradient = torch.tensor([[1.0, 1.0, 6.0, 0.0]])
    >>> gradient_kept([Selection(torch.tensor([[2]]), torch.zeros(1, 4), gradient=gradient)])
    0.75
    """
    return _share_kept(recording, "gradient")


def loss_kept(recording: Sequence[Selection]) -> float:
    """Fraction of the loss (summed over all tokens and steps) at kept tokens; 0 to 1.

    Raises:
        ValueError: the scorer did not compute the loss of tokens, or it is 0 for all tokens.

    >>> loss_kept([Selection(torch.tensor([[0, 3]]), torch.zeros(1, 4), loss=torch.tensor([[0.0, 1.0, 2.0, 1.0]]))])
    0.25
    """
    return _share_kept(recording, "loss")


def position_histogram(recording: Sequence[Selection], bins: int = 10) -> Tensor:
    """Fraction of the kept rows in each bin of relative positions i / T: float32 ``[bins]`` on the CPU; sums to 1.

    Row i of T counts in bin floor(i bins / T). T includes padding, and kept rows of padding count too. If T < bins,
    some bins are always empty.

    Raises:
        ValueError: ``bins`` is less than 1, or the recording is empty.

    >>> position_histogram([Selection(torch.tensor([[0, 1, 4, 7]]), torch.zeros(1, 8))], bins=4)
    tensor([0.5000, 0.0000, 0.2500, 0.2500])
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: expected at least 1.")
    counts = sum(torch.bincount(_bins(step, bins).flatten(), minlength=bins) for step in _some(recording))
    return counts / counts.sum()


def overlap(a: Sequence[Selection], b: Sequence[Selection]) -> float:
    """Mean Jaccard index |A ∩ B| / |A ∪ B| of the tokens that two recordings of the same batches kept; 0 to 1.

    The mean is over sequences, which are matched by step and row; their fingerprints are compared if both recordings
    have them. For two random selections of a fraction r of the tokens it is about r / (2 - r).

    Raises:
        ValueError: the recordings are not of the same batches.

    >>> a, b = (Selection(torch.tensor([rows]), torch.zeros(1, 8)) for rows in ([0, 1, 2], [1, 2, 3]))
    >>> overlap([a], [b])
    0.5
    """
    if len(_some(a)) != len(_some(b)):
        raise ValueError(f"The recordings have {len(a)} and {len(b)} steps. {_SAME_BATCHES}")
    return _mean([_jaccard(*_matched(i, x, y)) for i, (x, y) in enumerate(zip(a, b, strict=True))])


def visit_overlap(recording: Sequence[Selection]) -> float:
    """Mean Jaccard index of the tokens kept in consecutive visits of the same sequence; 0 to 1.

    A sequence is identified by ``Selection.instances``, the fingerprint of its token ids, including padding. Equal
    sequences in one batch are visits of one sequence, in the order of their rows.

    Raises:
        ValueError: fingerprints were not recorded, or no sequence was visited twice.

    >>> kept = [[0, 1], [1, 2]]
    >>> steps = [Selection(torch.tensor([rows]), torch.zeros(1, 8), instances=torch.tensor([5])) for rows in kept]
    >>> round(visit_overlap(steps), 3)
    0.333
    """
    _field(recording, "instances")
    found = [jaccard for visits in _revisits(recording) for jaccard in visits]
    if not found:
        raise ValueError(
            f"No sequence was visited twice in {len(recording)} steps. Record at least two epochs, and pad each "
            "sequence to the same length every time."
        )
    return _mean(found)


def overlaps(recording: Sequence[Selection]) -> list[float | None]:
    """``visit_overlap`` for each step, over its sequences that were visited before; ``None`` if there are none.

    >>> kept = [[0, 1], [0, 1]]
    >>> steps = [Selection(torch.tensor([rows]), torch.zeros(1, 8), instances=torch.tensor([5])) for rows in kept]
    >>> overlaps(steps)
    [None, 1.0]
    """
    return [_mean(visits) if visits else None for visits in _revisits(recording)]


def _revisits(recording: Sequence[Selection]) -> Iterator[list[Tensor]]:
    """For each step: the Jaccard index [1] of each sequence that was visited before, with its previous visit."""
    last: dict[tuple[int, int], Tensor] = {}
    for step in recording:
        found = []
        known = () if step.instances is None else zip(step.instances.tolist(), _kept(step), strict=True)
        for name, kept in known:
            visited = (name, len(kept))
            if visited in last:
                found.append(_jaccard(last[visited], kept)[None])
            last[visited] = kept
        yield found


@dataclass(frozen=True)
class Summary:
    """All figures of a recording; ``None``: undefined. ``str()`` gives a short report.

    ``sequences``: the number of visits, over all steps. ``tokens``, ``kept``: the number of their tokens and of the
    kept ones. ``positions``: ``position_histogram``. The others: the results of the functions of the same names.
    """

    steps: int
    sequences: int
    tokens: int
    kept: int
    positions: tuple[float, ...]
    labelled_kept: float | None
    gradient_kept: float | None
    loss_kept: float | None
    visit_overlap: float | None

    def __str__(self) -> str:
        bars = "".join(_BARS[round((len(_BARS) - 1) * share / max(self.positions))] for share in self.positions)
        return "\n".join(
            [
                f"kept {self.kept} of {self.tokens} tokens (steps: {self.steps}, sequences: {self.sequences})",
                f"  of all tokens        {_percent(self.kept / self.tokens)}",
                f"  of labelled tokens   {_percent(self.labelled_kept)}",
                f"  of the gradient      {_percent(self.gradient_kept)}",
                f"  of the loss          {_percent(self.loss_kept)}",
                f"  overlap of visits    {_percent(self.visit_overlap)}",
                f"  by position          start {bars} end, highest bar {_percent(max(self.positions))}",
            ]
        )


def summary(recording: Sequence[Selection], bins: int = 10) -> Summary:
    """All figures of the recording. ``bins``: of the histogram of positions.

    Raises:
        ValueError: the recording is empty, or ``bins`` is less than 1.

    >>> labelled = torch.ones(1, 10, dtype=torch.bool)
    >>> print(summary([Selection(torch.tensor([[0, 1]]), torch.zeros(1, 10), labelled=labelled)]))
    kept 2 of 10 tokens (steps: 1, sequences: 1)
      of all tokens        20.0%
      of labelled tokens   20.0%
      of the gradient      unknown
      of the loss          unknown
      overlap of visits    unknown
      by position          start ██▁▁▁▁▁▁▁▁ end, highest bar 50.0%
    """
    return Summary(
        steps=len(_some(recording)),
        sequences=sum(len(step.scores) for step in recording),
        tokens=sum(step.scores.numel() for step in recording),
        kept=sum(step.indices.numel() for step in recording),
        positions=tuple(position_histogram(recording, bins).tolist()),
        labelled_kept=_if_known(labelled_kept, recording),
        gradient_kept=_if_known(gradient_kept, recording),
        loss_kept=_if_known(loss_kept, recording),
        visit_overlap=_if_known(visit_overlap, recording),
    )


def _some(recording: Sequence[Selection]) -> Sequence[Selection]:
    if not any(step.indices.numel() for step in recording):
        raise ValueError("The recording is empty. Run a training step of a compiled model under tokenseek_fx.record().")
    return recording


def _field(recording: Sequence[Selection], name: str) -> list[Tensor]:
    """A field of all steps; ValueError if one lacks it."""
    values = [getattr(step, name) for step in _some(recording)]
    for i, value in enumerate(values):
        if value is None:
            raise ValueError(f"`{name}` was not recorded in step {i}. {_REMEDIES[name]}")
    return values


def _share_kept(recording: Sequence[Selection], name: str) -> float:
    """The sum of a field [B, T] at the kept rows, divided by its sum at all rows, over all steps together."""
    values = [value.cpu().double() for value in _field(recording, name)]
    kept = sum(value[_kept(step)].sum().item() for value, step in zip(values, recording, strict=True))
    if not (whole := sum(value.sum().item() for value in values)):
        raise ValueError(f"`{name}` is 0 for every token: the kept share is undefined. Record steps that have labels.")
    return kept / whole


def _bins(step: Selection, bins: int) -> Tensor:
    return (step.indices * bins // step.scores.shape[1]).cpu()


def _kept(step: Selection) -> Tensor:
    """The kept rows of a step: bool [B, T] on the CPU."""
    return torch.zeros(step.scores.shape, dtype=torch.bool).scatter(1, step.indices.cpu(), True)


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|A ∩ B| / |A ∪ B| along the last dim of two masks."""
    return (a & b).sum(-1).double() / (a | b).sum(-1)


def _mean(values: list[Tensor]) -> float:
    return torch.cat(values).mean().item()


def _matched(step: int, a: Selection, b: Selection) -> tuple[Tensor, Tensor]:
    """The kept rows in one step of two recordings, bool [B, T] each; ValueError if the batches differ."""
    if a.scores.shape != b.scores.shape:
        shapes = " and ".join(f"{len(x.scores)} sequences of {x.scores.shape[1]} tokens" for x in (a, b))
        raise ValueError(f"The recordings differ in step {step}: {shapes}. {_SAME_BATCHES}")
    if a.instances is not None and b.instances is not None:
        differ = (a.instances.cpu() != b.instances.cpu()).nonzero()
        if len(differ):
            raise ValueError(
                f"The recordings saw different sequences in step {step}, row {differ[0].item()}. {_SAME_BATCHES}"
            )
    return _kept(a), _kept(b)


def _if_known(figure: Callable[[Sequence[Selection]], float], recording: Sequence[Selection]) -> float | None:
    try:
        return figure(recording)
    except ValueError:
        return None


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
