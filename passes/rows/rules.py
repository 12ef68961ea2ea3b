"""Rows rules: an operation re-executed on the selected rows.

Most operations need none: their operands are restricted along the dim that carries the row, and the call is the same
(``rerun``). Rules are for operations whose *arguments* speak of tokens (the shape of a view, a causal flag) and for losses.
A rule is ``rule(call) -> value``; with ``call.rows(i)`` and ``call.full(i)`` it sees an operand restricted or in full. It
returns ``NotImplemented`` where it does not apply: the operation becomes a barrier.
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

#: Operations whose operands don't broadcast to one result: one that all instances share can't be given a batch dim.
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
    """Register a rows rule for operations."""

    def register(function: RowsRule) -> RowsRule:
        ROWS_RULES.register(targets, function)
        return function

    return register


def rerun(call: RowOp) -> Any:
    """The default: the same call on operands restricted where they carry the row, in full elsewhere."""
    return call.target(*call.args, **call.kwargs) if restricts(call) else NotImplemented


def restricts(call: RowOp) -> bool:
    """True when the operation can run on rows: some operand carries them, and instances may have different ones."""
    return call.carries_rows and _instances_stay_apart(call)


def _instances_stay_apart(call: RowOp) -> bool:
    """True when a row needs operands of its own instance alone, so that instances may have different rows."""
    axes = call.streams.axes
    at = call.row_index.axis.batch_dim_of(axes.of(call.node))
    carrying = [i for i in range(len(call.operands)) if call.carried(i) is not None]
    return at is None or all(_has_instances(call, i, at) for i in carrying)


def _has_instances(call: RowOp, operand: int, at: int) -> bool:
    """True when an operand carries the batch to dim ``at`` of the result, or can be broadcast there."""
    axes = call.streams.axes
    labels, rank = axes.of(call.operands[operand]), len(axes.of(call.node))
    own = call.row_index.axis.batch_dim_of(labels)
    if own is not None:
        return axes.carried(call.node, operand, at) == own
    place = at + len(labels) - rank
    return call.target not in _FIXED_RANK and (place < 0 or not labels[place])


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
    """A gradient by how often an id is there needs all ids."""
    return NotImplemented if call["scale_grad_by_freq"] else rerun(call)


@rows_rule(aten.expand.default)
def expand(call: RowOp) -> Any:
    return call.rows(0).expand(call.shape) if call.carries_rows else NotImplemented
