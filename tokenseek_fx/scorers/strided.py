"""Evenly spaced tokens."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer
from ._draw import draw


def strided() -> Scorer:
    """Score 1 where ``floor((i + 1) k / T)`` steps up: exactly k evenly spaced positions, the last one among them."""

    def score(inputs: ScoreInputs) -> torch.Tensor:
        position = torch.arange(inputs.tokens, device=inputs.device)
        step = (position + 1) * inputs.kept // inputs.tokens - position * inputs.kept // inputs.tokens
        return step.to(torch.float32).expand(inputs.batch, inputs.tokens)

    return score


if __name__ == "__main__":
    draw(strided())
