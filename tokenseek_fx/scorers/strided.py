"""Evenly spaced tokens."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer
from ._draw import draw


def strided() -> Scorer:
    """Score 1 at the positions i where ``floor((i + 1) k / T)`` increases: k evenly spaced ones, including the last."""

    def score(inputs: ScoreInputs) -> torch.Tensor:
        position = torch.arange(inputs.tokens, device=inputs.device)
        step = (position + 1) * inputs.kept // inputs.tokens - position * inputs.kept // inputs.tokens
        return step.to(torch.float32).expand(inputs.batch, inputs.tokens)

    return score


if __name__ == "__main__":
    draw(strided())
