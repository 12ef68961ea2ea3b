"""Tokens that the model predicts badly: the logarithm of the token's own loss."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def loss() -> Scorer:
    """log of the loss of the token: drawn, a token is as likely as its loss is large; tokens without a label come last."""

    @needs("loss", select="sample")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.loss is not None
        return inputs.loss.log()

    return score


if __name__ == "__main__":
    draw(loss())
