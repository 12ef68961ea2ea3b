"""The perturbation oracle: change one index of an operand and see which indices of the result move.

It trusts no rule. If a rule says that dim d of an operand is carried to dim r of the result, a change at index i along
d may move index i along r and no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_op import Case, OneOp, build, coordinate, draw
from operations import TABLE
from torch import Tensor, fx

from tokenseek_fx.passes.graph.nodes import operands_of

aten = torch.ops.aten


@st.composite
def settings_of(draw_, case: Case):
    """Sizes, a dim argument and a dtype."""
    sizes = draw_(st.lists(st.integers(2, 5), min_size=6, max_size=6))
    dims = max(1, len(case.terms[0].split()))
    dim = draw_(st.integers(-dims, dims - 1))
    return case.sizes(sizes, dim), draw_(st.sampled_from([torch.float32, torch.float64])), draw_(st.integers(0, 99))


@pytest.mark.parametrize("case", TABLE, ids=str)
@settings(max_examples=3, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_axes_that_a_rule_carries_move_independently(case, data):
    n, dtype, seed = data.draw(settings_of(case))
    torch.manual_seed(seed)
    operands = draw(case, n, dtype)
    op = build(case, n, operands)
    moved = Moved(op, operands, draw(case, n, dtype))
    for claim in claims(op):
        assert_moves_alone(moved, *claim)


class Moved:
    """Which elements of the results move when some elements of an operand change."""

    def __init__(self, op: OneOp, operands: list[Tensor], others: list[Tensor]) -> None:
        self.op, self.operands, self.others, self.before = op, operands, others, op.values(operands)

    def by(self, operand: int, result: fx.Node, dim: int, places: Tensor) -> Tensor:
        """bool, of the result's shape: what new values at ``places`` (bool) along ``dim`` of the operand move."""
        changed = list(self.operands)
        changed[operand] = torch.where(_along(places, dim, changed[operand]), self.others[operand], changed[operand])
        before, after = self.before[result], self.op.values(changed)[result]
        return ~((before == after) | (before.isnan() & after.isnan()))


def _along(places: Tensor, dim: int, like: Tensor) -> Tensor:
    return places.view([-1 if i == dim else 1 for i in range(like.ndim)])


Claim = tuple[int, int, Tensor, fx.Node, int, Tensor]


def claims(op: OneOp) -> Iterator[Claim]:
    """(operand, its dim, the coordinate along it, result, its dim, the coordinate along it) of everything carried."""
    for operand, node in enumerate(operands_of(op.node)):
        for result in op.results:
            for dim, before, to, after in _by_factor(op, operand, node, result) or _by_dim(op, operand, node, result):
                yield op.operands.index(node), dim, before, result, to, after


def _by_dim(op: OneOp, operand: int, node: fx.Node, result: fx.Node) -> Iterator[tuple]:
    for to, dim in op.axes.flows[op.node].carries[operand].items():
        yield dim, torch.arange(node.meta["val"].shape[dim]), to, torch.arange(result.meta["val"].shape[to])


def _by_factor(op: OneOp, operand: int, node: fx.Node, result: fx.Node) -> list[tuple]:
    """The same for a view, whose dims correspond by their factors: every factor in turn as the token axis."""
    if not op.axes.flows[op.node].regrouped:
        return []
    labels, found = op.axes.of(result), []
    for factor in {f for label in labels for f in label}:
        axes = op.named((factor,), ()).axes
        for to in axes.token_dims(result):
            dim = axes.carried(op.node, operand, to)
            if dim is not None:
                before = coordinate(axes.space, axes.of(node)[dim], (factor,))
                found.append((dim, before, to, coordinate(axes.space, labels[to], (factor,))))
    return found


def assert_moves_alone(
    moved: Moved, operand: int, dim: int, before: Tensor, result: fx.Node, to: int, after: Tensor
) -> None:
    for i in before.unique():
        places = moved.by(operand, result, dim, before == i)
        assert not (places & _along(after != i, to, places)).any(), (
            f"operand {operand}: dim {dim} is not carried to {to}"
        )


def pointwise_overloads() -> Iterator[Case]:
    """Every ATen operation with the pointwise tag that takes only tensors and numbers."""
    numbers = {"number": 1.5, "float": 1.5, "int": 1, "bool": True}
    for packet in (getattr(aten, name) for name in dir(aten) if not name.startswith("_") and not name.endswith("_")):
        for op in (getattr(packet, name) for name in getattr(packet, "overloads", list)()):
            types = [str(a.type) for a in op._schema.arguments if not (a.has_default_value() or a.kwarg_only)]
            tags = set(op.tags) & {torch.Tag.pointwise, torch.Tag.nondeterministic_seeded}
            if tags == {torch.Tag.pointwise} and not op._schema.is_mutable and set(types) <= {"Tensor", *numbers}:
                yield Case(op, ", ".join(SHAPES[: types.count("Tensor")]), "b t d", partial(_fill, types, numbers), {})


SHAPES = ["b t d", "t 1", "b 1 d"]


def _fill(types: list[str], numbers: dict, n, *operands) -> tuple:
    rest = iter(operands)
    return tuple(next(rest) if kind == "Tensor" else numbers[kind] for kind in types)


def test_the_pointwise_tag_can_be_trusted():
    checked = 0
    for case in pointwise_overloads():
        n = case.sizes()
        operands = draw(case, n)
        try:
            op = build(case, n, operands)
        except (RuntimeError, TypeError, NotImplementedError):  # not for float64, or needs more arguments
            continue
        moved = Moved(op, operands, draw(case, n))
        for claim in claims(op):
            assert_moves_alone(moved, *claim)
        checked += 1
    assert checked > 150


def test_the_oracle_detects_a_wrong_claim():
    """A matmul whose rule says that its contracted dim is carried."""
    case = next(case for case in TABLE if case.op == aten.mm.default)
    n = case.sizes()
    operands = draw(case, n)
    op = build(case, n, operands)
    moved = Moved(op, operands, draw(case, n))
    with pytest.raises(AssertionError, match="not carried"):
        assert_moves_alone(moved, 0, 1, torch.arange(n.k), op.node, 1, torch.arange(n.j))
