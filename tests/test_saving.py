"""What is kept for backward: values that are computed again there are the same, random ones are not computed again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_matches
from hypothesis import HealthCheck, given, settings
from test_random import RATIOS, Transformer, batches, configurations
from torch import Tensor, nn

RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
B, T, D, V = 2, 13, 12, 29


def draw(x: Tensor) -> Tensor:
    """A hidden layer times what several random operations give."""
    x = F.dropout(x, 0.5) * torch.rand_like(x) + x * torch.bernoulli(torch.full_like(x, 0.5))
    return x * torch.randn_like(x)


class Drawing(nn.Module):
    """Two blocks of causal attention (with dropout) and an MLP that draws."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.mixing = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(D, D) for _ in range(2)) for _ in range(2))
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for mixing, up, down in zip(self.mixing, self.up, self.down, strict=True):
            q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in mixing(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3).transpose(1, 2).flatten(2)
            x = x + down(draw(up(x).relu()))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "labels": ids}


@settings(max_examples=10, **RELAXED)
@given(configurations(), batches(), RATIOS)
def test_rows_that_are_computed_again_equal_the_reference(configuration, batch, ratio):
    assert_matches(Transformer(configuration), batch, 1e-9, keep_ratio=ratio, recompute="rows")


@pytest.mark.slow
@settings(max_examples=4, **RELAXED)
@given(configurations(), batches(), RATIOS)
def test_inductor_computes_rows_again_that_equal_the_reference(configuration, batch, ratio):
    assert_matches(Transformer(configuration), batch, 1e-6, keep_ratio=ratio, recompute="rows", inner="inductor")


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", ["none", "rows"])
def test_backward_sees_what_the_forward_drew(inner, recompute):
    """The slope of the loss by the last block's layers, for which keys and values are given, at one seed."""
    torch._dynamo.reset()
    model, batch = Drawing(), tokens()
    options = {"inner": inner, "keep_ratio": 0.4, "scorer": "first", "report_loss": "kept", "recompute": recompute}
    step = torch.compile(model, backend="tokenseek", options={**options, "strict": True})

    def loss() -> Tensor:
        torch.manual_seed(3)
        return step(**batch)

    loss().backward()
    weight, slope = model.up[-1].weight, 1e-6 * torch.randn(D, D, dtype=torch.float64)
    expected = 2 * (weight.grad * slope).sum()
    weight.data += slope
    above = loss()
    weight.data -= 2 * slope
    torch.testing.assert_close((above - loss()).detach(), expected, rtol=1e-4, atol=0)
