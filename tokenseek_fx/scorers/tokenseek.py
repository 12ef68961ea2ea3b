"""TokenSeek: attention received, and the gradient at the last block (ICLR 2026, arXiv 2601.19739).

score = alpha log(I1) + beta minmax(I2)
"""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def tokenseek(alpha: float = 1.0, beta: float = 1.0) -> Scorer:
    """``alpha log(I1) + beta minmax(I2)``, with minmax over the tokens of a sequence. A factor of 0 removes its term.

    I1 [B, T]: attention received. I2 [B, T]: absolute gradient.
    """
    wanted = [name for name, factor in (("attention", alpha), ("gradient", beta)) if factor]

    @needs(*wanted)
    def score(inputs: ScoreInputs) -> torch.Tensor:
        total = torch.zeros(inputs.batch, inputs.tokens, device=inputs.device)
        if inputs.attention is not None and alpha:
            total = total + alpha * inputs.attention.log()
        if inputs.gradient is not None and beta:
            total = total + beta * minmax(inputs.gradient)
        return total

    return score


def minmax(x: torch.Tensor) -> torch.Tensor:
    """(x - min) / (max - min) over the last dim; 0 if all values are equal. Any shape and float dtype."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / torch.where(high > low, high - low, 1)


if __name__ == "__main__":
    draw(tokenseek())
