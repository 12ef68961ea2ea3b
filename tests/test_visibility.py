"""Visibility: its conditions, for one pair of query and key at a time, and the agreement of its methods."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenseek_fx.ops.visibility import ALL_KEYS, Visibility, with_flat_visibility

B, S = 2, 9


@st.composite
def visibilities(draw) -> Visibility:
    segments = draw(st.sampled_from([None, 1, B]))
    segments = None if segments is None else torch.randint(3, (segments, S)).sort().values
    return Visibility(causal=draw(st.booleans()), window=draw(st.sampled_from([0, 1, 3, 20])), segments=segments)


def sees(visibility: Visibility, b: int, p: int, j: int) -> bool:
    """Whether the query at position p sees the key at position j, as the page says."""
    segments = visibility.segments
    own = segments is None or segments[b % len(segments), p] == segments[b % len(segments), j]
    near = visibility.window == 0 or abs(p - j) < visibility.window
    return bool(own and near and (j <= p or not visibility.causal))


@settings(deadline=None)
@given(visibilities(), st.sampled_from([1, B]), st.integers(1, S), st.integers(1, S))
def test_a_key_is_visible_if_every_condition_holds(visibility, instances, queries, keys):
    p, j = (torch.stack([torch.randperm(S)[:n].sort().values for _ in range(instances)]) for n in (queries, keys))
    found = visibility.visible(p, j)
    assert (found is None) is not visibility.by_position
    found = (torch.ones(1, queries, keys, dtype=torch.bool) if found is None else found).expand(B, -1, -1)
    for b in range(B):
        places = [(int(x), int(y)) for x in p[b % instances] for y in j[b % instances]]
        assert [*found[b].flatten()] == [sees(visibility, b, x, y) for x, y in places]


@settings(deadline=None)
@given(visibilities(), st.integers(0, S - 1), st.integers(0, S - 1))
def test_reach_is_the_range_of_the_visible_keys(visibility, one, other):
    first, last = min(one, other), max(one, other)
    by_position = Visibility(causal=visibility.causal, window=visibility.window)
    found = [j for j in range(S) if any(sees(by_position, 0, p, j) for p in range(first, last + 1))]
    begin, end = visibility.reach(first, last)
    assert found == [*range(max(0, begin or 0), S if end is None else min(S, end + 1))]
    tensors = visibility.reach(torch.tensor(first), torch.tensor(last))
    assert tensors == (begin, end)


@settings(deadline=None)
@given(visibilities(), st.sampled_from([1, B]))
def test_counts_are_those_of_the_visible_keys(visibility, instances):
    by_position = Visibility(causal=visibility.causal, window=visibility.window)
    shown, positions = torch.rand(instances, S) < 0.5, torch.arange(S).expand(B, -1)
    seen = torch.tensor([[sees(by_position, 0, p, j) for j in range(S)] for p in range(S)])
    assert torch.equal(by_position.counts(shown, positions), (seen & shown[:, None]).sum(-1).expand(B, -1))


@pytest.mark.parametrize("visibility", [ALL_KEYS, Visibility(mask=torch.ones(1, 1, 1, S), window=3, scored=True)])
def test_the_flat_form_has_all_fields(visibility):
    flat = visibility.flat()
    assert vars(Visibility.from_flat(flat)) == vars(visibility)
    tensors, numbers = flat[: Visibility.TENSORS], flat[Visibility.TENSORS :]
    assert all(x is None or isinstance(x, Tensor) for x in tensors)
    assert all(isinstance(x, (bool, int)) for x in numbers)


def test_an_operator_takes_the_fields():
    def keys(query: Tensor, visibility: Visibility) -> Tensor:
        return query + visibility.window

    operator = with_flat_visibility(keys)
    schema = torch.library.infer_schema(operator, mutates_args=())
    fields = "Tensor? mask, Tensor? segments, Tensor? fully_masked, bool causal, SymInt window, bool scored"
    assert schema == f"(Tensor query, {fields}) -> Tensor"
    assert operator(torch.zeros(1), *Visibility(window=3).flat()) == 3
