"""Live keys/values: with ``kv_grad="all"``, the values that are computed with gradient for all tokens."""

from __future__ import annotations

from torch import fx

from ..analysis.activity import Activity
from ..analysis.blocks import Blocks
from ..analysis.token_axes import TokenAxes
from ..graph.errors import GraphNotSupported
from ..graph.nodes import is_tensor, operands_of
from ..graph.op_sets import CONTRACTIONS, MULTIPLICATIONS
from ..graph.program import Program
from ..rules.attention import attention_op


def live_kv(program: Program) -> frozenset[fx.Node]:
    """Keys and values and the operations that compute them in their block.

    Other values that queries read across tokens are included.

    Raises:
        GraphNotSupported: the keys of an attention depend on another attention in the same block.
    """
    live, axes, stream = program[Activity].live, program[TokenAxes], program[Blocks].stream
    found: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        wanted = _is_read_across(program, node) or any(user in found for user in node.users)
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
    """True if rows read the value at the positions of other rows."""
    return any(
        _reads_across(program[TokenAxes], user, i, node)
        for user in node.users
        if user in program[Activity].live
        for i, operand in enumerate(operands_of(user))
        if operand is node
    )


def _reads_across(axes: TokenAxes, user: fx.Node, operand: int, node: fx.Node) -> bool:
    """True for keys, values and all else that is mixed, and for a term of the scores that depends on keys alone."""
    attention = attention_op(user)
    if attention is not None or not is_tensor(user):
        return attention is not None and node in (attention.key, attention.value)
    row, mine = axes.row_dim(user), axes.row_dim(node)
    carried = None if row is None else axes.carried(user, operand, row)
    if user.target in CONTRACTIONS:
        return (row is not None or mine is not None) and (mine is None or carried != mine)
    reads = operand == 0 or user.target in MULTIPLICATIONS  # of ``x.type_as(y)``, y is not read
    if reads and mine is not None and row is not None and carried is None:
        return True  # rows are mixed, or those of another dim
    return axes.has_rows(user) and carried in axes.token_dims(node) and carried != mine
