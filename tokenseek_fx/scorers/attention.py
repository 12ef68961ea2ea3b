"""Tokens that receive much attention: log I1, TokenSeek's context score."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def attention() -> Scorer:
    """log I1. ``attention_layers`` says which attentions count."""

    @needs("attention")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.attention is not None
        return inputs.attention.log()

    return score


if __name__ == "__main__":
    draw(attention())
