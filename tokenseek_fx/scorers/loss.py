"""Tokens that the model predicts badly: the logarithm of a token's loss."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def loss() -> Scorer:
    """log of the loss: tokens are drawn with probabilities proportional to their loss [B, T].

    Tokens without a label come last, in random order.
    """

    @needs("loss", select="sample")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.loss is not None
        return inputs.loss.log()

    return score


if __name__ == "__main__":
    draw(loss())
