"""Draws what a scorer picks on a toy: one line per sequence, kept tokens as blocks."""

from __future__ import annotations

import torch

from ..passes.select import Scorer, TopK


def draw(scorer: Scorer, batch: int = 3, tokens: int = 60, keep_ratio: float = 0.25) -> None:
    noise = torch.rand(batch, tokens)
    _, indices = TopK(scorer, keep_ratio)(batch, tokens, torch.device("cpu"), noise)
    for row in indices.tolist():
        print("".join("█" if i in row else "·" for i in range(tokens)))
