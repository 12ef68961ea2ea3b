"""Recomputed keys/values: keep smaller values of all tokens, and recompute keys and values where rows attend to them.

For every attention by position, a minimum cut finds the fewest bytes from which its block can compute keys and values
token by token: usually the normed input of the block (half the bytes of keys and values if there are as many key heads
as query heads), or the result of a smaller projection. If no such values are smaller, keys and values themselves are
kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from ..analysis.activity import Activity
from ..analysis.blocks import Blocks
from ..analysis.token_axes import TokenAxes
from ..attention.positional import PositionalAttention, PositionalAttentions
from ..graph.errors import ConfigError, tell_no_effect
from ..graph.nodes import bytes_hint, is_random, is_tensor
from ..graph.op_sets import MATMULS
from ..graph.program import Program
from ..rules.attention import attention_op
from .kv_modes import KEEP, KVMode
from .token_parallel import is_parallel

aten = torch.ops.aten
_GIVEN, _WANTED = "given", "wanted"

#: A value in its own dtype (``None``), or cast to this dtype.
Value = tuple[fx.Node, torch.dtype | None]


@dataclass(frozen=True)
class KVRecompute:
    """Keys and values that are recomputed in the ditch stream.

    Args:
        nodes: the operations that run again.
        sources: the values of all tokens that these start from.
        attentions: the attentions whose keys or values are recomputed.
    """

    nodes: frozenset[fx.Node] = frozenset()
    sources: frozenset[Value] = frozenset()
    attentions: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class PlanKV:
    """Check the keys/values mode and find what it recomputes.

    Reads ``TokenAxes``, ``Activity``, ``Routes``, ``Blocks``, ``PositionalAttentions``; writes ``KVRecompute``.

    Args:
        mode: the keys/values mode.
        is_inductor: Inductor will compile the graph.
        strict: a mode without effect is an error instead of a warning.

    Raises:
        ConfigError: the mode can't be used on this device or with this compiler.
        GraphNotSupported: ``strict``, and the mode has no effect.
    """

    mode: KVMode = KEEP
    is_inductor: bool = False
    strict: bool = False
    name: str = "kv plan"

    def run(self, program: Program) -> Program:
        if reason := self.mode.check(_device(program), self.is_inductor):
            raise ConfigError(reason)
        found = recomputed_kv(program) if self.mode.recomputes else KVRecompute()
        tell_no_effect(self._without_effect(program, found), self.strict)
        return program.with_(found)

    def check(self, program: Program) -> None:
        """Nothing to verify: recomputed values equal the first ones."""

    def _without_effect(self, program: Program, found: KVRecompute) -> Iterator[tuple[str, str]]:
        """A fact and a remedy if attentions keep their keys and values despite the mode."""
        live = [a.out for a in program[TokenAxes].attentions if a.out in program[Activity].live]
        count = sum(node not in program[PositionalAttentions] for node in live)
        if self.mode.recomputes and count < len(live):
            if not found.attentions:
                fact = (
                    f"kv={self.mode.name!r} has no effect: keys and values can't be recomputed from fewer bytes "
                    f"(attentions: {len(live) - count})."
                )
                yield fact, "Use kv='keep': with grouped heads, keys and values are small already."
        elif self.mode != KEEP and count:
            fact = f"kv={self.mode.name!r}: {count} of {len(live)} attentions keep their keys and values as they are."
            yield fact, "Use scaled_dot_product_attention without dropout, with a mask that compares positions."


def _device(program: Program) -> torch.device:
    return next(x.device for x in program.inputs if isinstance(x, torch.Tensor))


def recomputed_kv(program: Program) -> KVRecompute:
    """The keys and values that can be recomputed, in every block."""
    blocks, positional = _block_numbers(program), program[PositionalAttentions]
    nodes, sources, attentions = set[fx.Node](), set[Value](), set[fx.Node]()
    for attention in reversed(positional):  # keys that a later block reads too are kept once for both
        if attention not in program[Activity].live:
            continue
        inside = {node for node, block in blocks.items() if block == blocks[attention]}
        recomputed, kept = _cut(program, positional[attention], inside, sources)
        nodes |= recomputed
        sources |= kept
        if recomputed:
            attentions.add(attention)
    return KVRecompute(frozenset(nodes), frozenset(sources), frozenset(attentions))


def cast_by(reader: fx.Node, node: fx.Node) -> torch.dtype | None:
    """The dtype to which autocast converts ``node`` for the matrix product ``reader``; ``None``: its own dtype."""
    if reader.target not in MATMULS or not is_tensor(node) or not node.meta["val"].is_floating_point():
        return None
    dtype = reader.meta["val"].dtype
    return None if dtype == node.meta["val"].dtype else dtype


def value_bytes(value: Value) -> int:
    """The bytes of a tensor, in the dtype that it is cast to."""
    node, dtype = value
    own = node.meta["val"].dtype
    return bytes_hint(node) * (dtype or own).itemsize // own.itemsize


def _block_numbers(program: Program) -> dict[fx.Node, int]:
    """The block of the ditch stream in which each node is traced."""
    number, found = 1, {}
    for node in program.graph.nodes:
        found[node] = number
        number += node in program[Blocks].ends
    return found


def _cut(
    program: Program, attention: PositionalAttention, inside: set[fx.Node], kept: set[Value]
) -> tuple[set[fx.Node], set[Value]]:
    """A minimum cut between the inputs of a block and the key and value of its attention.

    Of several cuts with as many bytes, the one with the fewest operations is taken.

    Args:
        program: the program.
        attention: the attention.
        inside: the nodes of its block.
        kept: values that are kept anyway and cost nothing.

    Returns:
        The operations that recompute key and value, and the values that they start from.
    """
    wanted: tuple[Value, ...] = ((attention.key, None), (attention.value, None))
    reads = _reads(program, wanted, inside)
    flow = nx.DiGraph()
    flow.add_nodes_from((_GIVEN, _WANTED))
    flow.add_edges_from(((value, True), _WANTED) for value in wanted)
    for value, read in reads.items():
        size = 0 if value in kept else _size(program, value)
        flow.add_edge((value, False), (value, True), **({} if size is None else {"capacity": size}))
        sources = [_GIVEN] if read is None else [(x, True) for x in read]
        flow.add_edges_from((source, (value, False)) for source in sources)
    _, (_, below) = nx.minimum_cut(flow, _GIVEN, _WANTED)
    made = {value for value in reads if (value, False) in below}
    starts = {*wanted, *(x for value in made for x in reads[value] or ())} - made
    return {node for node, dtype in made if dtype is None}, {value for value in starts if _size(program, value)}


def _reads(program: Program, wanted: Iterable[Value], inside: set[fx.Node]) -> dict[Value, list[Value] | None]:
    """The values from which each value may be recomputed ``inside`` a block, ``wanted`` first.

    ``None``: the value can't be recomputed.
    """
    found, todo = dict[Value, list[Value] | None](), [*wanted]
    while todo:
        value = node, dtype = todo.pop()
        if value in found:
            continue
        if dtype is not None:
            found[value] = [(node, None)]
        elif node in inside and _can_recompute(program, node):
            found[value] = [(x, cast_by(node, x)) for x in node.all_input_nodes]
        else:
            found[value] = None
        todo += found[value] or []
    return found


def _can_recompute(program: Program, node: fx.Node) -> bool:
    """True if a second run gives the same value, for each token independently or without tokens."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or is_random(node):
        return False
    if attention_op(node) is not None or node in program[PositionalAttentions]:
        return False
    tokens = is_tensor(node) and program[TokenAxes].token_dims(node)
    return target.is_view or (is_parallel(program, node) if tokens else is_tensor(node))


def _size(program: Program, value: Value) -> int | None:
    """Bytes to store a value; 0 if it is live anyway; ``None`` if it can't be stored.

    Inputs without tokens are live anyway, and so are values that rows read too.
    """
    (node, _), axes = value, program[TokenAxes]
    if not is_tensor(node):
        return None if isinstance(node.meta.get("val"), (tuple, list)) else 0
    if node.op == "placeholder" and node not in [program.placeholders[i] for i in program.mutated]:
        return value_bytes(value) if axes.token_dims(node) and node.meta["val"].is_floating_point() else 0
    return value_bytes(value) if axes.token_dims(node) or node in program[Activity].live else 0
