"""Row rules: how an operation is re-executed on the kept rows.

Most operations need no rule: their operands are restricted along the dim that carries the rows, and the call stays the
same (``rerun``). A rule is for an operation whose *arguments* depend on tokens (the shape of a view, a causal flag), or
for a loss. It is a function ``rule(call) -> value``; ``call.rows(i)`` and ``call.full(i)`` are an operand restricted to
the kept rows or in full. A rule that does not apply returns ``NotImplemented``, and the operation becomes a barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph.registry import Registry
from .row_op import RowOp

aten = torch.ops.aten
RowsRule = Callable[[RowOp], Any]
ROWS_RULES: Registry[RowsRule] = Registry("row rule")

#: Operations whose operands don't broadcast to the result, so an operand without a batch dim can't be given one.
_FIXED_RANK = (
    aten.broadcast_tensors.default,
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.embedding.default,
    aten.einsum.default,
)


def rows_rule(*targets: Any) -> Callable[[RowsRule], RowsRule]:
    """Register a row rule: ``rule(call) -> value``, or ``NotImplemented`` if it does not apply.

    Raises:
        ValueError: a target has a row rule already.
    """

    def register(function: RowsRule) -> RowsRule:
        ROWS_RULES.register(targets, function)
        return function

    return register


def rerun(call: RowOp) -> Any:
    """The default rule: the same call on operands restricted where they carry the row, in full elsewhere."""
    return call.target(*call.args, **call.kwargs) if restricts(call) else NotImplemented


def restricts(call: RowOp) -> bool:
    """True if the operation can run on rows: some operand carries them, and instances may keep different rows."""
    return call.carries_rows and _instances_stay_apart(call)


def _instances_stay_apart(call: RowOp) -> bool:
    """True if a row needs only operands of its own instance, so that instances may keep different rows."""
    axes = call.streams.axes
    at = call.row_index.axis.batch_dim_of(axes.of(call.node))
    carrying = [i for i in range(len(call.operands)) if call.carried(i) is not None]
    return at is None or all(_has_instances(call, i, at) for i in carrying)


def _has_instances(call: RowOp, operand: int, at: int) -> bool:
    """True if an operand carries the batch to dim ``at`` of the result, or is broadcast to another one that does.

    An operation that makes the batch itself (``repeat``, ``cat``, ``index_select``) needs its operand as it is.
    """
    axes = call.streams.axes
    labels, rank = axes.of(call.operands[operand]), len(axes.of(call.node))
    own = call.row_index.axis.batch_dim_of(labels)
    if own is not None:
        return axes.carried(call.node, operand, at) == own
    place, others = at + len(labels) - rank, range(len(call.operands))
    is_matrix = call.target is aten.matmul.default and at >= rank - 2
    is_broadcast = not is_matrix and call.target not in _FIXED_RANK and (place < 0 or not labels[place])
    return is_broadcast and any(axes.carried(call.node, i, at) is not None for i in others)


@rows_rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def regroup(call: RowOp) -> Any:
    return call.rows(0).reshape(call.shape) if call.carries_rows else NotImplemented


@rows_rule(aten.embedding.default)
def embedding(call: RowOp) -> Any:
    """``scale_grad_by_freq`` scales gradients by how often an id occurs, which needs all ids."""
    return NotImplemented if call["scale_grad_by_freq"] else rerun(call)


@rows_rule(aten.expand.default)
def expand(call: RowOp) -> Any:
    return call.rows(0).expand(call.shape) if call.carries_rows else NotImplemented
