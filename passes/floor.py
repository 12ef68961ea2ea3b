"""Floor: the least that a rewritten graph keeps for backward.

Keys and values of all tokens, before their heads are repeated, and of the kept rows what the plain graph keeps per token, or
with ``recompute="rows"`` one row where each block begins, and the head. What is saved is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from .audit import Audit
from .program import Program
from .remake import bytes_of, find_remade
from .rules.op import bytes_hint, operands_of
from .streams import LAYOUT
from .token_axes import ATTENDING, TokenAxis


def keys_and_values(program: Program) -> list[fx.Node]:
    """The keys and values of the attentions that carry gradient, each once, before heads are repeated."""
    assert program.activity is not None and program.axes is not None
    attending = [node for node in program.graph.nodes if node.target in ATTENDING and node in program.activity.live]
    context = [operand for node in attending for operand in node.args[1:3] if isinstance(operand, fx.Node)]
    return list(dict.fromkeys(_unrepeated(x) for x in context if program.axes.token_dims(x)))


def floor(program: Program, shares: Mapping[TokenAxis, float], kv: str = "keep", plain: Audit | None = None) -> int:
    """Bytes that have to be kept where ``shares`` of the tokens of every axis are: with what the ``plain`` graph of all tokens
    keeps, or without it, where blocks are computed again. ``kv``: how keys and values are kept (``context.py``, ``remake.py``)."""
    assert program.axes is not None and program.blocks is not None
    context = _context(program, kv)
    if plain is not None:
        return int(context + shares[program.axes.main] * plain.bytes)
    rows = ((node, program.axes.axis_of(node)) for node in program.blocks.ends)
    return int(context + sum(bytes_hint(node) * shares[axis] for node, axis in rows if axis))


def _context(program: Program, kv: str) -> float:
    """Bytes of the device that keys and values take, or what is kept in place of them."""
    if kv != "recompute":
        return sum(bytes_hint(node) * _share(node, kv) for node in keys_and_values(program))
    remade = find_remade(program)
    kept = {(node, None) for node in keys_and_values(program) if node not in remade.nodes}
    return sum(map(bytes_of, kept | {(_unrepeated(node), dtype) for node, dtype in remade.sources}))


def _share(node: fx.Node, kv: str) -> float:
    """The share of the bytes of a key or value that is kept on the device."""
    return {"keep": 1, "fp8": 1 / node.meta["val"].element_size(), "offload": 0}[kv]


def _unrepeated(node: fx.Node) -> fx.Node:
    while node.target in LAYOUT and len(operands_of(node)) == 1:
        (node,) = operands_of(node)
    return node
