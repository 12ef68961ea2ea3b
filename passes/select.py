"""Select: scores -> the sorted indices of the kept rows of every instance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

#: ``scorer(shape) -> scores [B, T]``
Scorer = Callable[["ScoreInputs"], torch.Tensor]


@dataclass(frozen=True)
class ScoreInputs:
    """What a scorer sees: ``batch`` instances of ``tokens`` tokens of which ``kept`` will be kept, and ``noise``
    (float32 ``[B, T]`` uniform in [0, 1), for scorers that need it)."""

    batch: Any
    tokens: Any
    kept: Any
    device: torch.device
    noise: torch.Tensor | None = None


def kept_tokens(tokens: Any, keep_ratio: float | None = None, keep: int | None = None) -> Any:
    """k = ceil(keep_ratio * T), computed exactly for the decimal the user wrote, or ``keep`` where T is larger.

    >>> kept_tokens(1024, 0.1), kept_tokens(100, 0.07), kept_tokens(8, keep=16)
    (103, 7, 8)
    """
    if keep is not None:
        return torch.sym_min(keep, tokens)
    ratio = Fraction(repr(keep_ratio))
    return (tokens * ratio.numerator + ratio.denominator - 1) // ratio.denominator


@dataclass(frozen=True)
class TopK:
    """The kept rows are those with the highest scores; ties go to the earlier position."""

    scorer: Scorer
    keep_ratio: float | None = 0.1
    keep_tokens: int | None = None

    def __call__(
        self, batch: Any, tokens: Any, device: torch.device, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(scores [B, T] float, indices [B, k] int64, sorted)``."""
        kept = kept_tokens(tokens, self.keep_ratio, self.keep_tokens)
        scores = self.scorer(ScoreInputs(batch, tokens, kept, device, noise))
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        return scores, torch.sort(order[:, :kept], dim=-1).values
