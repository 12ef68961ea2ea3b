"""The first or the last tokens of each sequence."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer
from ._draw import draw


def first() -> Scorer:
    """Keep the first tokens: earlier tokens score higher."""
    return lambda inputs: -_positions(inputs)


def last() -> Scorer:
    """Keep the last tokens: later tokens score higher."""
    return lambda inputs: _positions(inputs)


def _positions(inputs: ScoreInputs) -> torch.Tensor:
    position = torch.arange(inputs.tokens, device=inputs.device, dtype=torch.float32)
    return position.expand(inputs.batch, inputs.tokens)


if __name__ == "__main__":
    draw(first())
    draw(last())
