"""Regions that sort rows and restore their order: proved row-wise, or a barrier; exact in both cases."""

from __future__ import annotations

import pytest
import torch
from compare import assert_matches
from programs import analysed
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx.passes.analysis.routing import Routes
from tokenseek_fx.passes.graph.program import Program

B, T, D, EXPERTS = 3, 13, 8, 4


class Model(nn.Module):
    """One attention, then ``route(x [B*T, D], keys [B*T, k], weights [B*T, k], w) -> [B*T, D]``, and a loss."""

    def __init__(self, route, k: int = 2) -> None:
        super().__init__()
        self.route, self.k = route, k
        self.embed, self.qkv, self.gate = nn.Embedding(20, D), nn.Linear(D, 3 * D), nn.Linear(D, EXPERTS)
        self.experts, self.head = nn.Parameter(torch.randn(EXPERTS, D)), nn.Linear(D, 20)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        query, key, value = self.qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(query, key, value)
        rows = x.reshape(-1, D)
        weights, keys = self.gate(rows).softmax(-1).topk(self.k, -1)
        x = x + self.route(rows, keys, weights, self.experts).reshape(x.shape)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys, order = keys.reshape(-1).sort()
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    return keys, order, places


def experts(rows, keys, weights, w):
    """Sorts by expert, scales each row, and restores the order."""
    k = keys.shape[-1]
    sorted_keys, order, places = _sorted(keys)
    y = torch.tanh(rows[order // k]) * w[sorted_keys]
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[places].view(-1, k, D).sum(1)


def split_and_gated(rows, keys, weights, w):
    k = keys.shape[-1]
    sorted_keys, order, places = _sorted(keys)
    up, gate = (rows[order // k] * w[sorted_keys]).chunk(2, -1)
    return torch.cat([up * nn.functional.silu(gate), gate], -1)[places].view(-1, k, D).mean(1)


def brought_back_elsewhere(rows, keys, weights, w):
    """Restores by the order instead of its inverse: rows of other tokens come back."""
    k = keys.shape[-1]
    sorted_keys, order, _ = _sorted(keys)
    return (rows[order // k] * w[sorted_keys])[order].view(-1, k, D).sum(1)


def mixed_on_the_way(rows, keys, weights, w):
    k = keys.shape[-1]
    _, order, places = _sorted(keys)
    return rows[order // k].cumsum(0)[places].view(-1, k, D).sum(1)


def taken_from_other_rows(rows, keys, weights, w):
    """Divides by a number other than that of a token's rows."""
    k = keys.shape[-1]
    _, order, places = _sorted(keys)
    return rows[order // (k + 1)][places].view(-1, k, D).sum(1)


def numbered_otherwise(rows, keys, weights, w):
    """Positions that start at one."""
    k = keys.shape[-1]
    _, order, _ = _sorted(keys)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, order.shape[0] + 1) % order.shape[0]
    return rows[order // k][places].view(-1, k, D).sum(1)


def read_in_another_order(rows, keys, weights, w):
    """Restores the order, but reads the result as k consecutive copies of the rows of all tokens."""
    k = keys.shape[-1]
    sorted_keys, order, places = _sorted(keys)
    return (rows[order // k] * w[sorted_keys])[places].view(k, -1, D).sum(0)


PROVED = [experts, split_and_gated]
MIXED = [read_in_another_order, brought_back_elsewhere, mixed_on_the_way, taken_from_other_rows, numbered_otherwise]


def model_and_batch(route, k: int = 2) -> tuple[Model, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(20, (B, T))
    return Model(route, k).double(), {"ids": ids, "labels": ids}


def routes_of(model: nn.Module, batch: dict[str, Tensor]) -> int:
    found = []

    def look(gm, inputs):
        found.append(analysed(Program(gm, tuple(inputs))))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=look)(**batch)
    return len(found[0][Routes].found)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("route", PROVED)
def test_a_proved_region_runs_on_the_kept_rows(route, k):
    model, batch = model_and_batch(route, k)
    assert routes_of(model, batch) == 1
    assert not tokenseek_fx.explain(model, **batch).barriers
    assert_matches(model, batch, 1e-9, length=T)


@pytest.mark.parametrize("route", MIXED)
def test_a_region_that_mixes_rows_is_not_proved(route):
    model, batch = model_and_batch(route)
    assert routes_of(model, batch) == 0
    assert tokenseek_fx.explain(model, **batch).barriers


def test_all_rows_give_the_ordinary_gradient_through_a_region_that_is_not_proved():
    model, batch = model_and_batch(brought_back_elsewhere)
    model(**batch).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="tokenseek", options={"keep_ratio": 1.0, "logits": "drop", "inner": "eager"})(
        **batch
    ).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-12)
