"""Draw the tokens that a scorer selects in a toy batch: one line per sequence, with kept tokens as blocks."""

from __future__ import annotations

import torch

from ..passes.streams.select import ScoreInputs, Scorer, Select


def toy(batch: int = 3, tokens: int = 60) -> ScoreInputs:
    """Inputs [batch, tokens] as in fine-tuning.

    A prompt and a labelled answer, an attention sink at the first token, and a gradient and a loss that are largest at
    a few tokens of the answer.
    """
    torch.manual_seed(0)
    position = torch.arange(tokens).expand(batch, tokens)
    answer = position >= tokens // 2
    surprise = torch.rand(batch, tokens) ** 3
    return ScoreInputs(
        batch,
        tokens,
        torch.device("cpu"),
        noise=torch.rand(batch, tokens),
        attention=torch.rand(batch, tokens) + 8.0 / (1 + position),
        gradient=surprise * answer + 0.1 * torch.rand(batch, tokens),
        loss=surprise * answer,
        labelled=answer,
    )


def draw(scorer: Scorer, keep_ratio: float = 0.25) -> None:
    """Print one line per sequence of the toy batch."""
    inputs = toy()
    for row in Select(scorer, keep_ratio)(inputs).indices.tolist():
        print("".join("█" if i in row else "·" for i in range(inputs.tokens)))
