"""A learned table of positions, written out for every sequence of the batch in different ways: the same gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import by_reference, error, executed
from torch import Tensor, nn

PREFIX, D, V = 3, 8, 11
SIZES = [(5, 9), (7, 13)]
Spelling = Callable[[Tensor, int], Tensor]


def zeros(batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.long)


def gathered_by_product(table: Tensor, batch: int) -> Tensor:
    return (torch.ones(batch, 1, dtype=table.dtype) @ table.flatten(1)).view(batch, *table.shape[1:])


#: [1, T, D] -> [B, T, D].
SPELLINGS: dict[str, Spelling] = {
    "expand": lambda p, b: p.expand(b, -1, -1),
    "repeat": lambda p, b: p.repeat(b, 1, 1),
    "tile": lambda p, b: p.tile(b, 1, 1),
    "repeat_interleave": lambda p, b: p.repeat_interleave(b, 0),
    "concatenated": lambda p, b: torch.cat([p] * b),
    "stacked": lambda p, b: torch.stack([p[0]] * b),
    "stacked, squeezed": lambda p, b: torch.stack([p] * b).squeeze(1),
    "index": lambda p, b: p[zeros(b)],
    "index_select": lambda p, b: p.index_select(0, zeros(b)),
    "padded": lambda p, b: F.pad(p, (0, 0, 0, 0, 0, b - 1)),
    "times ones": lambda p, b: torch.ones(b, 1, 1, dtype=p.dtype) * p,
    "einsum": lambda p, b: torch.einsum("b,td->btd", torch.ones(b, dtype=p.dtype), p[0]),
}


class Model(nn.Module):
    """Attention over tokens behind a prefix, which only the table has."""

    def __init__(self, spelling: Spelling, tokens: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.table = spelling, nn.Parameter(torch.randn(1, PREFIX + tokens, D))
        self.embed, self.qkv, self.head = nn.Linear(D, D), nn.Linear(D, 3 * D), nn.Linear(D, V)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = F.pad(self.embed(x), (0, 0, PREFIX, 0)) + self.spelling(self.table, x.shape[0])
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_has_the_gradient_of_the_reference(name, size):
    batch, tokens = size
    model = Model(SPELLINGS[name], tokens)
    x = torch.randn(batch, tokens, D, dtype=torch.float64)
    inputs = {"x": x, "labels": torch.randint(V, (batch, PREFIX + tokens))}
    run = executed(model, inputs, report_loss="kept")
    expected = by_reference(model, inputs, run.indices, PREFIX + tokens)
    assert error(run.grads, expected.grads) < 1e-12


def test_a_product_with_ones_is_that_of_the_expanded_table():
    """The reference can't tell the tokens of a product ``[B, T * D]``."""
    x, labels = torch.randn(5, 9, D, dtype=torch.float64), torch.randint(V, (5, PREFIX + 9))
    one, other = (
        executed(Model(spelling, 9), {"x": x, "labels": labels}, report_loss="kept", scorer="strided")
        for spelling in (gathered_by_product, SPELLINGS["expand"])
    )
    assert error(one.grads, other.grads) < 1e-12
