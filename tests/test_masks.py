"""Masks: what is read from a mask equals the mask; one with other conditions is not read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tokenseek_fx.passes.attention.mask_reader import read_mask
from tokenseek_fx.passes.attention.masks import Mask
from tokenseek_fx.passes.capture.canonicalize import Canonicalize
from tokenseek_fx.passes.graph.nodes import bind
from tokenseek_fx.passes.graph.program import Program

B, H, T, E = 3, 2, 7, 4


def at_rows_and_keys() -> tuple[Tensor, Tensor, Tensor]:
    """Indices [B, 1, 1, 1], [1, 1, T, 1] and [1, 1, 1, T], as transformers makes them."""
    n = torch.arange(T)
    return torch.arange(B)[:, None, None, None], n[None, None, :, None], n[None, None, None, :]


def causal(seen: Tensor, places: Tensor) -> Tensor:
    _, q, k = at_rows_and_keys()
    return k <= q


def window(seen: Tensor, places: Tensor) -> Tensor:
    _, q, k = at_rows_and_keys()
    return (k <= q) & (k > q - 3)


def padded(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    return (q >= k) & seen[b, k]


def keys_alone(seen: Tensor, places: Tensor) -> Tensor:
    return seen[:, None, None, :].expand(B, 1, T, T)


def added_to_keys(seen: Tensor, places: Tensor) -> Tensor:
    return (1.0 - seen.float())[:, None, None, :] * -1e9


def packed(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    number = (torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (number[b, q] == number[b, k]) & (places[b, k] <= places[b, q])


def one_sequence(seen: Tensor, places: Tensor) -> Tensor:
    """Default positions: one segment, in order."""
    return packed(seen, torch.arange(T)[None].expand(B, -1))


def segments(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    return places[b, q] == places[b, k]


def later(seen: Tensor, places: Tensor) -> Tensor:
    _, q, k = at_rows_and_keys()
    return k >= q


def both_sides(seen: Tensor, places: Tensor) -> Tensor:
    _, q, k = at_rows_and_keys()
    return (q - k).abs() < 3


def between(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    return (k <= q + 2) & (k + 3 > q) & seen[b, k]


def packed_window(seen: Tensor, places: Tensor) -> Tensor:
    _, q, k = at_rows_and_keys()
    return packed(seen, places) & (k > q - 3)


READ = [
    causal,
    window,
    padded,
    keys_alone,
    added_to_keys,
    packed,
    one_sequence,
    segments,
    both_sides,
    between,
    packed_window,
]


def lopsided(seen: Tensor, places: Tensor) -> Tensor:
    _, q, k = at_rows_and_keys()
    return (k <= q + 2) & (k > q - 2)


def one_ahead(seen: Tensor, places: Tensor) -> Tensor:
    _, q, k = at_rows_and_keys()
    return k <= q + 1


def either(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    return (k <= q) | seen[b, k]


def by_row(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    return (k <= q) & seen[b, q]


def places_without_segments(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    return places[b, k] <= places[b, q]


def places_in_other_segments(seen: Tensor, places: Tensor) -> Tensor:
    b, q, k = at_rows_and_keys()
    return (seen[b, q] == seen[b, k]) & (places[b, k] <= places[b, q])


def counted_from_the_end(seen: Tensor, places: Tensor) -> Tensor:
    """For the first query, x[q - 1] is the last element."""
    _, q, k = at_rows_and_keys()
    return k <= torch.arange(T)[q - 1]


NOT_READ = [later, lopsided, one_ahead, either, by_row, places_without_segments, places_in_other_segments]
NOT_READ += [counted_from_the_end]


def read(make) -> tuple[Mask | None, Tensor, dict[fx.Node, object]]:
    """What is read from the mask, the mask itself, and the values of the graph."""
    seen = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.7
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    found = []

    def look(gm, inputs):
        program = Canonicalize().run(Program(gm, tuple(inputs)))
        (node,) = program.graph.find_nodes(
            op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
        )
        found.append((program, bind(node)["attn_mask"]))
        return gm.forward

    query = torch.randn(B, H, T, E)

    def attend(query: Tensor, seen: Tensor, places: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, query, query, make(seen, places))

    torch._dynamo.reset()
    torch.compile(attend, backend=look, dynamic=False)(query, seen, places)
    ((program, mask),) = found
    values: dict[fx.Node, object] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    given = {(*x.shape, x.dtype): x for x in (query, seen, places)}
    Keep(program.module).run(*(given[(*x.shape, x.dtype)] for x in program.inputs))
    return read_mask(mask), make(seen, places), values


def dense(mask: Mask, values: dict) -> Tensor:
    """The mask that was read, [B, 1, T, T]."""
    q, k = torch.arange(T)[:, None], torch.arange(T)
    shown = torch.ones(B, 1, T, T, dtype=torch.bool)
    if mask.causal:
        shown = shown & (k <= q)
    if mask.window:
        shown = shown & ((q - k).abs() < mask.window)
    visibility = mask.at(values)
    keys, numbers = visibility.mask, visibility.segments
    if numbers is not None:
        shown = shown & (numbers[:, None, :, None] == numbers[:, None, None, :])
    return shown if keys is None else shown & (keys if keys.dtype is torch.bool else keys > -1)


@pytest.mark.parametrize("make", READ, ids=lambda make: make.__name__)
def test_what_is_read_equals_the_mask(make):
    mask, actual, values = read(make)
    assert mask is not None
    shown = actual if actual.dtype is torch.bool else actual > -1
    assert torch.equal(dense(mask, values), shown.expand(B, 1, T, T))


@pytest.mark.parametrize("make", NOT_READ, ids=lambda make: make.__name__)
def test_a_mask_with_other_conditions_is_not_read(make):
    mask, _, _ = read(make)
    assert mask is None


def test_causal_and_window_need_no_tensor():
    mask, _, values = read(window)
    assert mask == Mask(causal=True, window=3)
    assert mask.at(values).flat() == (None, None, None, True, 3, False)
