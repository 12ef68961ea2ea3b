"""Random tokens, the same number in each sequence: the baseline, and the selection of TokenTune."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def random() -> Scorer:
    """Uniform noise as scores: k tokens are drawn without replacement.

    With ``select="sample"``, which adds its own noise, all scores are equal.
    """

    @needs("noise")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        if inputs.noise is None:
            return torch.zeros(inputs.batch, inputs.tokens, device=inputs.device)
        return inputs.noise.clone()

    return score


if __name__ == "__main__":
    draw(random())
