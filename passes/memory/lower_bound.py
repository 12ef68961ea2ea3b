"""Lower bound: the fewest bytes that a rewritten graph saves for backward.

These are keys and values of all tokens, before heads are repeated, and for the kept rows what the plain graph saves per
token; or, if blocks are recomputed, one row at the input of every block and of the head.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..analysis.activity import Activity
from ..analysis.blocks import Blocks
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..graph.nodes import bytes_hint, operands_of
from ..graph.op_sets import LAYOUT
from ..graph.program import Program
from ..keep.kv_modes import KEEP, KVMode
from ..keep.recompute_kv import recomputed_kv, value_bytes
from ..rules.attention import read_across
from .saved import Audit


def kv_to_keep(program: Program) -> list[fx.Node]:
    """The keys and values of the live attentions, each once, before heads are repeated."""
    live, axes = program[Activity].live, program[TokenAxes]
    context = [x for node in program.graph.nodes if node in live for x in read_across(node) if axes.token_dims(x)]
    return list(dict.fromkeys(map(_unrepeated, context)))


def lower_bound(
    program: Program, shares: Mapping[TokenAxis, float], kv: KVMode = KEEP, plain: Audit | None = None
) -> int:
    """Bytes that must be saved if these shares of the tokens of every axis are kept.

    Reads ``TokenAxes``, ``Activity``, ``Blocks`` and ``PositionalAttentions``.

    Args:
        program: the program.
        shares: the share of kept tokens of every token axis.
        kv: the keys/values mode.
        plain: the tensors that the plain graph saves for all tokens; ``None``: blocks are recomputed, so the rows that
            enter each block are enough.
    """
    context = _context(program, kv)
    if plain is not None:
        return int(context + shares[program[TokenAxes].main] * plain.bytes)
    rows = ((node, program[TokenAxes].axis_of(node)) for node in program[Blocks].ends)
    return int(context + sum(bytes_hint(node) * shares[axis] for node, axis in rows if axis))


def _context(program: Program, kv: KVMode) -> float:
    """Bytes on the device of keys and values, or of the values that are kept in their place."""
    if not kv.recomputes:
        return sum(map(kv.kept_bytes, kv_to_keep(program)))
    recomputed = recomputed_kv(program)
    kept = {(node, None) for node in kv_to_keep(program) if node not in recomputed.nodes}
    return sum(map(value_bytes, kept | {(_unrepeated(node), dtype) for node, dtype in recomputed.sources}))


def _unrepeated(node: fx.Node) -> fx.Node:
    while node.target in LAYOUT and len(operands_of(node)) == 1:
        (node,) = operands_of(node)
    return node
