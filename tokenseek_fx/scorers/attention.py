"""Tokens that receive much attention: log I1, the context score of TokenSeek (arXiv 2601.19739)."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def attention() -> Scorer:
    """log I1, where I1 [B, T] is the attention received. The option ``attention_layers`` selects the attentions."""

    @needs("attention")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.attention is not None
        return inputs.attention.log()

    return score


if __name__ == "__main__":
    draw(attention())
