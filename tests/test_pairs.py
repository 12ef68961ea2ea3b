"""Losses of pairs of sequences in one batch (InfoNCE, SimCSE): ordinary losses of their rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import Grads, error, executed, grads_of
from test_backend import Model, T, data
from torch import Tensor, nn

from tokenseek_fx import reference


def infonce(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.05, torch.arange(len(a)))


def simcse(a: Tensor, b: Tensor) -> Tensor:
    similar = F.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1) / 0.05
    return F.cross_entropy(similar, torch.arange(len(a))) + F.cross_entropy(similar.T, torch.arange(len(a)))


HEADS = {
    "chunk": lambda x: infonce(*x[:, 0].chunk(2)),
    "slices": lambda x: infonce(x[:, -1][::2], x[:, -1][1::2]),
    "view": lambda x: infonce(*x.mean(1).view(2, -1, x.shape[-1])),
    "index_select": lambda x: infonce(*(x[:, 0].index_select(0, torch.arange(i, len(x), 2)) for i in (0, 1))),
    "index": lambda x: infonce(*(x[:, 0][torch.arange(i, len(x), 2)] for i in (0, 1))),
    "before": lambda x: infonce(*(half.mean(1) for half in x.chunk(2))),
    "cosine similarity": lambda x: simcse(*x[:, 0].unflatten(0, (-1, 2)).unbind(1)),
    "regression": lambda x: F.mse_loss(F.cosine_similarity(*x.mean(1).chunk(2)), torch.ones(len(x) // 2).double()),
    "margin": lambda x: F.relu(1 - x[::2, 0].mul(x[1::2, 0]).sum(-1)).mean(),
}


def by_hand(model: nn.Module, batch: dict[str, Tensor], indices: Tensor, head: str) -> tuple[Tensor, Grads]:
    """Loss and gradient of the hidden states of the reference, whose other rows carry no gradient."""
    plain = copy.deepcopy(model)
    plain.head = lambda self, x, labels: x
    with reference.ditching(plain, indices, T):
        x = plain(**batch)
    kept = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, indices, True).unsqueeze(-1)
    loss = HEADS[head](torch.where(kept, x, x.detach()))
    loss.backward()
    return loss, grads_of(plain)


@pytest.mark.parametrize("head", HEADS)
def test_pairs_in_one_batch(head):
    model = Model(lambda self, x, labels: HEADS[head](x), layers=1)
    for size in (6, 10):
        run = executed(model, data(size))
        loss, expected = by_hand(model, data(size), run.indices, head)
        torch.testing.assert_close(run.loss, loss, rtol=1e-12, atol=0)
        assert error(run.grads, expected) < 1e-12
