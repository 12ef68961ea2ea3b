"""Tokens whose gradient is large: log I2, TokenSeek's gradient score."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def gradient() -> Scorer:
    """log I2: drawn, a token is as likely as its gradient is large. ``gradient_of`` says where it is taken."""

    @needs("gradient", select="sample")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.gradient is not None
        return inputs.gradient.log()

    return score


if __name__ == "__main__":
    draw(gradient())
