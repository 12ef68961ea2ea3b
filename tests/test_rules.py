"""The law of every rule, for every placement of token axis and batch: selecting rows commutes with the operation.

``rows(op(x)) == ditch(op)(rows(x))``, values and gradients, for every row of the operation table.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from one_op import Case, OneOp, build, ditch, draw, law, rows_index, selection
from operations import RANDOM, TABLE
from torch._ops import HigherOrderOperator

from tokenseek_fx.passes.analysis.activity import Activity
from tokenseek_fx.passes.graph.errors import GraphNotSupported
from tokenseek_fx.passes.graph.factors import Dim
from tokenseek_fx.passes.graph.op_sets import LABEL_LOSSES
from tokenseek_fx.passes.rules.op import AXES_RULES

aten = torch.ops.aten
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def placements(case: Case, op: OneOp) -> Iterator[tuple[str, Dim, str, Dim]]:
    """Every axis as the token axis, without a batch and with every other axis as the batch (except one of the keys)."""
    axes = [
        (letter, dim) for letter, dims in op.names.items() for dim in dict.fromkeys(map(op.axes.space.resolve, dims))
    ]
    for (token, t), (batch, b) in product(axes, [("", ()), *axes]):
        if not set(t) & set(b) and not batch.isupper():
            yield token, t, batch, b


def is_barrier(case: Case, op: OneOp, token: str, batch: str) -> bool | None:
    """What the table says; None if it says nothing, since an operand has the tokens of all instances at once."""
    live = op.program[Activity].live
    if not any(op.axes.has_rows(node) for node in (*op.operands, op.node) if node in live):
        return False
    with_token = [term for term in case.terms if token in term]
    if batch and batch not in case.shares and any(batch not in term for term in with_token):
        return None
    return token not in case.rows or batch not in case.rows


def which_live(case: Case) -> Iterator[list[bool]]:
    """All float operands carry gradient, or only the first of them."""
    floats = [not term.startswith(("const", "<", "bool")) for term in case.terms]
    yield floats
    if sum(floats) > 1:
        first = floats.index(True)
        yield [i == first for i in range(len(floats))]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_selecting_rows_commutes_with_the_operation(case):
    torch.manual_seed(0)
    n = case.sizes()
    operands = draw(case, n)
    for live in which_live(case):
        operands = [x.detach().requires_grad_(flag) for x, flag in zip(operands, live, strict=True)]
        op = build(case, n, operands)
        for token, t, batch, b in placements(case, op):
            check_placement(case, op.named(t, b), operands, token, batch)


def check_placement(case: Case, op: OneOp, operands: list[torch.Tensor], token: str, batch: str) -> None:
    place, barrier = f"token {token}, batch {batch or 'none'}", is_barrier(case, op, token, batch)
    try:
        barriers = check_law(op, operands, place)
    except GraphNotSupported:  # a loss over anything but all tokens has no definition
        assert case.op in LABEL_LOSSES, place
        assert not op.axes.has_rows(op.node), place
    else:
        if op.node in op.program[Activity].live:
            assert barrier in (None, bool(barriers)), place


def check_law(op: OneOp, operands: list[torch.Tensor], place: str) -> int:
    """Values and gradients of the ditch stream are those of the definition; returns the number of barriers."""
    indices = selection(op)
    actual, barriers = ditch(op, operands, indices)
    expected = law(op, operands, indices)
    assert actual.keys() == expected.keys()
    for node, value in expected.items():
        torch.testing.assert_close(actual[node], value, **EXACT, msg=lambda text: f"{place}: {text}")
    seed = {node: torch.randn_like(value) for node, value in expected.items() if value.requires_grad}
    for a, e in zip(grads(actual, seed, operands), grads(expected, seed, operands), strict=True):
        torch.testing.assert_close(a, e, **EXACT, msg=lambda text: f"{place}: gradient: {text}")
    return len(barriers)


def grads(results: dict, seed: dict, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    live = [x for x in operands if x.requires_grad]
    if not seed:
        return []
    total = sum((results[node] * seed[node]).real.sum() for node in seed)
    return list(torch.autograd.grad(total, live, allow_unused=True, materialize_grads=True))


def test_every_axes_rule_has_a_row_in_the_table():
    in_table = {case.op for case in [*TABLE, *RANDOM]} | {operator.getitem}
    # rules of users' own operators (another test may have registered some) and of libraries have tests of their own
    ours = [op for op in AXES_RULES if getattr(op, "namespace", "") == "aten"]
    missing = [op for op in ours if op not in in_table and not isinstance(op, HigherOrderOperator)]
    assert not missing


@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random_draws_are_restricted_to_the_rows(case):
    """Their rows are new draws, so only shapes can be compared."""
    n = case.sizes()
    operands = [x.sigmoid().requires_grad_() for x in draw(case, n)]
    op = build(case, n, operands)
    for token, t, batch, b in placements(case, op):
        placed = op.named(t, b)
        indices = selection(placed)
        actual, barriers = ditch(placed, operands, indices)
        expected = law(placed, operands, indices)
        assert {node: x.shape for node, x in actual.items()} == {node: x.shape for node, x in expected.items()}
        assert bool(barriers) == bool(is_barrier(case, placed, token, batch))


LABELS = ["(b t) v, <v (b t)", "b v t, <v b t", "(t b) v, <v (t b)"]


@pytest.mark.parametrize("ignored", [0, 5, 8])
@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("operands", LABELS)
def test_a_loss_is_that_of_the_kept_labels_at_the_scale_of_the_full_loss(operands, reduction, ignored):
    """A mean over the kept labels; a sum over them times labelled / kept labelled; 0 where none is kept."""
    case = Case(aten.cross_entropy_loss.default, operands, "", lambda n, x, y: (x, y, None, reduction, -100), {})
    torch.manual_seed(ignored)
    x, y = draw(case, case.sizes())
    y.view(-1)[torch.randperm(y.numel())[:ignored]] = -100
    x.requires_grad_()
    op = build(case, case.sizes(), [x, y])
    op = op.named(op.names["t"][0], op.names["b"][0])
    indices = selection(op)
    kept = torch.full_like(y, -100)
    rows = rows_index(op.axes, op.axes.of(op.operands[1]), op.axes.row_dim(op.operands[1]), indices)
    kept[rows] = y[rows]
    number = max(1, (kept != -100).sum().item())
    scale = 1 / number if reduction == 1 else (y != -100).sum() / number
    expected = F.cross_entropy(x, kept, reduction="sum") * scale
    (actual,) = ditch(op, [x, y], indices)[0].values()
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (actual, expected)), **EXACT)


def test_a_loss_over_the_positions_of_an_answer_is_an_ordinary_loss():
    """Extractive question answering: the tokens are the classes, so the loss needs them all."""
    case = Case(aten.cross_entropy_loss.default, "b t, <t b", "", lambda n, x, y: (x, y), {})
    torch.manual_seed(0)
    x, y = draw(case, case.sizes())
    op = build(case, case.sizes(), [x.requires_grad_(), y])
    op = op.named(op.names["t"][0], op.names["b"][0])
    indices = selection(op)
    (actual,), (expected,) = (list(f.values()) for f in (ditch(op, [x, y], indices)[0], law(op, [x, y], indices)))
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (actual, expected)), **EXACT)
