"""The algebra of axes: where a factor is after views and permutations, checked on a tensor of row numbers."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenseek_fx.passes.graph.factors import Axes, Dim, Space

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4)
quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def recut(data: st.DataObject, shape: list[int]) -> list[int]:
    """A shape with the same number of elements and dims cut at any divisor."""
    rest, cut = prod(shape), []
    while rest > 1 and len(cut) < 4:
        cut.append(data.draw(st.sampled_from(divisors(rest))))
        rest //= cut[-1]
    return [*cut, rest]


def merge_or_split(data: st.DataObject, shape: list[int]) -> list[int]:
    """Merge two neighbours or split a dim."""
    at = data.draw(st.integers(0, len(shape) - 1))
    if at + 1 < len(shape) and data.draw(st.booleans()):
        return [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]
    head = data.draw(st.sampled_from(divisors(shape[at])))
    return [*shape[:at], head, shape[at] // head, *shape[at + 1 :]]


def chain(data: st.DataObject, space: Space, shape: list[int]) -> tuple[Axes, Axes, torch.Tensor]:
    """Axes before and after a random chain of views and permutations of a tensor of row numbers, and the tensor."""
    before = after = space.fresh_axes(shape)
    numbers = torch.arange(prod(shape)).reshape(shape)
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["permute", "merge or split", "recut"]))
        if kind == "permute":
            order = data.draw(st.permutations(range(numbers.ndim)))
            numbers, after = numbers.permute(order), tuple(after[i] for i in order)
        else:
            new = (merge_or_split if kind == "merge or split" else recut)(data, list(numbers.shape))
            numbers, after = numbers.reshape(new), space.regroup(after, new)
    return before, after, numbers


def resolved(space: Space, axes: Axes) -> Axes:
    return tuple(space.resolve(dim) for dim in axes)


def coordinate(space: Space, axes: Axes, factor: int) -> torch.Tensor:
    """The index along a factor of every element of a tensor with these axes."""
    sizes = [space.size((f,)) for dim in axes for f in dim]
    at = [f for dim in axes for f in dim].index(factor)
    index = torch.arange(prod(sizes)) // prod(sizes[at + 1 :]) % sizes[at]
    return index.reshape([space.size(dim) for dim in axes])


@quick
@given(data=st.data(), shape=SIZES)
def test_a_factor_that_survives_views_is_the_same_index(data, shape):
    space = Space()
    before, after, numbers = chain(data, space, shape)
    before, after = resolved(space, before), resolved(space, after)
    for factor in set(sum(before, ())) & set(sum(after, ())):
        was, is_now = coordinate(space, before, factor), coordinate(space, after, factor)
        assert torch.equal(was.flatten()[numbers], is_now)


@quick
@given(data=st.data(), shape=SIZES)
def test_sizes_multiply_to_the_shape(data, shape):
    space = Space()
    before, after, numbers = chain(data, space, shape)
    assert [space.size(space.resolve(dim)) for dim in after] == list(numbers.shape)
    assert [space.size(space.resolve(dim)) for dim in before] == shape


@quick
@given(data=st.data(), shape=SIZES)
def test_resolve_is_idempotent_and_gives_roots(data, shape):
    space = Space()
    before, after, _ = chain(data, space, shape)
    for dim in (*before, *after):
        once = space.resolve(dim)
        assert space.resolve(once) == once
        assert all(space.resolve((f,)) == (f,) for f in once)


@quick
@given(data=st.data(), shape=SIZES)
def test_merging_and_splitting_back_is_the_identity(data, shape):
    """A view that cuts where factors end loses nothing, so the way back gives the same axes."""
    space = Space()
    axes = space.fresh_axes(shape)
    finer = space.regroup(axes, merge_or_split(data, shape))
    assert resolved(space, space.regroup(finer, shape)) == resolved(space, axes)
    assert sum(resolved(space, finer), ()) == sum(resolved(space, axes), ())


def related(data: st.DataObject, space: Space) -> tuple[Dim, Dim]:
    """Two dims of the same size, each cut into factors in its own way."""
    size = data.draw(st.sampled_from([2, 4, 6, 8, 12, 24]))
    return tuple(sum(space.fresh_axes(recut(data, [size])), ()) for _ in range(2))


@quick
@given(data=st.data())
def test_equate_is_symmetric(data):
    cuts = [recut(data, [size := data.draw(st.sampled_from([4, 6, 8, 12, 24]))]), recut(data, [size])]
    agree = []
    for swap in (False, True):
        space = Space()
        left, right = (sum(space.fresh_axes(cut), ()) for cut in cuts)
        space.equate(*((right, left) if swap else (left, right)))
        agree.append(space.resolve(left) == space.resolve(right))
    assert agree[0] == agree[1]


@quick
@given(data=st.data())
def test_equate_keeps_sizes_and_never_joins_factors_of_different_size(data):
    space = Space()
    dims = [dim for _ in range(3) for dim in related(data, space)]
    sizes = {f: space.size((f,)) for dim in dims for f in dim}
    for _ in range(3):
        space.equate(*data.draw(st.tuples(st.sampled_from(dims), st.sampled_from(dims))))
    for factor, size in sizes.items():
        assert space.size(space.resolve((factor,))) == size
        assert all(space.size((root,)) > 1 for root in space.resolve((factor,)))


@quick
@given(data=st.data())
def test_equal_dims_become_one(data):
    """If one cut refines the other, the two dims are equal afterwards, and equating them twice changes nothing."""
    space, size = Space(), data.draw(st.integers(2, 24))
    whole, cut = space.fresh(size), sum(space.fresh_axes(recut(data, [size])), ())
    space.equate(whole, cut)
    assert space.resolve(whole) == space.resolve(cut)
    before = space.resolve(whole)
    space.equate(cut, whole)
    assert space.resolve(whole) == before


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 2)), ((4,), (6,)), ((2, 2), (3,))])
def test_dims_that_do_not_align_stay_apart(a, b):
    space = Space()
    left, right = (sum(space.fresh_axes(sizes), ()) for sizes in (a, b))
    space.equate(left, right)
    assert not set(space.resolve(left)) & set(space.resolve(right))


def test_dims_of_equal_size_are_different_until_equated():
    space = Space()
    a, b = space.fresh(4), space.fresh(4)
    assert space.resolve(a) != space.resolve(b)
    space.equate(a, b)
    assert space.resolve(a) == space.resolve(b)


def test_a_view_that_cuts_through_factors_forgets_them():
    space = Space()
    axes = space.fresh_axes([2, 3])
    after = space.regroup(axes, [3, 2])
    assert not set(sum(after, ())) & set(sum(axes, ()))


def test_a_split_is_seen_by_every_value_with_the_factor():
    space = Space()
    (tokens,) = space.fresh_axes([6])
    rows, columns = space.regroup((tokens,), [3, 2])
    assert space.resolve(tokens) == rows + columns
