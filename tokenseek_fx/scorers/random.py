"""Random tokens, the same number in every sequence: the baseline, TokenTune's choice."""

from __future__ import annotations

import torch

from ..passes.select import ScoreInputs, Scorer
from ._draw import draw


def random() -> Scorer:
    """Uniform noise as scores: k tokens drawn without replacement."""

    def score(inputs: ScoreInputs) -> torch.Tensor:
        assert inputs.noise is not None
        return inputs.noise.clone()

    score.needs_noise = True  # type: ignore[attr-defined]
    return score


if __name__ == "__main__":
    draw(random())
