"""Random tokens, the same number in every sequence: the baseline, TokenTune's choice."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, needs
from ._draw import draw


def random() -> Scorer:
    """Uniform noise as scores: k tokens drawn without replacement. With ``select="sample"``, which is random by itself, all
    tokens are equally likely."""

    @needs("noise")
    def score(inputs: ScoreInputs) -> torch.Tensor:
        if inputs.noise is None:
            return torch.zeros(inputs.batch, inputs.tokens, device=inputs.device)
        return inputs.noise.clone()

    return score


if __name__ == "__main__":
    draw(random())
