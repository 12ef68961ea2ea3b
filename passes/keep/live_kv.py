"""Live keys/values: with ``kv_grad="all"``, what is computed with gradient for all tokens."""

from __future__ import annotations

from torch import fx

from ..analysis.activity import Activity
from ..analysis.blocks import Blocks
from ..analysis.token_axes import TokenAxes
from ..analysis.values import feeds_attention
from ..graph.errors import GraphNotSupported
from ..graph.nodes import is_tensor, operands_of
from ..graph.program import Program


def live_kv(program: Program) -> frozenset[fx.Node]:
    """Keys and values, what else queries look at, and what computes them from the input of their block."""
    live, axes, stream = program[Activity].live, program[TokenAxes], program[Blocks].stream
    found: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        is_read = feeds_attention(node) or _is_read_across(program, node)
        wanted = is_read or any(user in found for user in node.users)
        if wanted and node.op == "call_function" and node in live and node not in stream:
            found.add(node)
    for attention in axes.attentions:
        if attention.node in found:
            raise GraphNotSupported(
                "The keys of an attention are made of another attention in its block, so that kv_grad='all' is not defined.",
                "Choose kv_grad='selected', or add what the first attention gives to the residual stream.",
                attention.node,
            )
    return frozenset(found)


def _is_read_across(program: Program, node: fx.Node) -> bool:
    """True where its rows are of keys, and what reads it has the rows of queries (a part of scores that keys alone give)."""
    axes = program[TokenAxes]
    for user in node.users:
        if user in program[Activity].live and is_tensor(user) and axes.has_rows(user):
            dims = (axes.carried(user, i, axes.row_dim(user)) for i, arg in enumerate(operands_of(user)) if arg is node)
            if any(dim in axes.token_dims(node) and dim != axes.row_dim(node) for dim in dims):
                return True
    return False
