"""Tokens with a large gradient: log I2, the gradient score of TokenSeek (arXiv 2601.19739)."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def gradient() -> Scorer:
    """log I2: tokens are drawn with probabilities proportional to I2 [B, T], the absolute gradient at the token.

    The option ``gradient_of`` selects where the gradient is taken.
    """

    @needs("gradient", select="sample")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.gradient is not None
        return inputs.gradient.log()

    return score


if __name__ == "__main__":
    draw(gradient())
