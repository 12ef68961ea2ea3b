"""Live keys/values: with ``kv_grad="all"``, the values that are computed with gradient for all tokens."""

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
    """Keys and values and the operations that compute them in their block.

    Other values that queries read across tokens are included.

    Raises:
        GraphNotSupported: the keys of an attention depend on another attention in the same block.
    """
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
                "The keys of an attention depend on another attention in its block, so kv_grad='all' is not defined.",
                "Use kv_grad='selected', or add the output of the first attention to the residual stream.",
                attention.node,
            )
    return frozenset(found)


def _is_read_across(program: Program, node: fx.Node) -> bool:
    """True if its rows are those of keys, and a value with the rows of queries reads it.

    Such a value is a term of the scores that depends on keys alone.
    """
    axes = program[TokenAxes]
    for user in node.users:
        if user in program[Activity].live and is_tensor(user) and axes.has_rows(user):
            dims = (axes.carried(user, i, axes.row_dim(user)) for i, arg in enumerate(operands_of(user)) if arg is node)
            if any(dim in axes.token_dims(node) and dim != axes.row_dim(node) for dim in dims):
                return True
    return False
