"""Remake: keys and values made again where rows look at them, from values of all tokens that take fewer bytes.

A minimum cut finds, for every attention that looks at keys and values by position, the fewest bytes from which its block can
make them token by token: mostly the normed input of the block, which is half of them in a model with as many key heads as
query heads, or what a smaller projection gives. Where nothing takes fewer bytes than the keys and values, these are kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from .attend import Attending
from .parallel import is_parallel
from .program import Program
from .rules.op import bytes_hint, is_random, is_tensor
from .token_axes import SDPA

aten = torch.ops.aten
_GIVEN, _WANTED = "given", "wanted"
#: Matrix products: what autocast gives its operands in the dtype of the result.
PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
)

#: A value as it is (``None``), or cast to a dtype.
Value = tuple[fx.Node, torch.dtype | None]


@dataclass(frozen=True)
class Remade:
    """``nodes``: the operations of the program that are done once more. ``sources``: the values of all tokens that they start
    from. ``attentions``: those whose keys or values are made again."""

    nodes: frozenset[fx.Node] = frozenset()
    sources: frozenset[Value] = frozenset()
    attentions: frozenset[fx.Node] = frozenset()


def find_remade(program: Program) -> Remade:
    """What is made again in every block. Reads ``axes``, ``activity``, ``blocks`` and ``attending``."""
    blocks = _block_numbers(program)
    nodes, sources, attentions = set[fx.Node](), set[Value](), set[fx.Node]()
    for attention in reversed(program.attending):  # one that looks at what another block made keeps it for both
        if attention not in program.activity.live:
            continue
        inside = {node for node, block in blocks.items() if block == blocks[attention]}
        again, kept = _cut(program, program.attending[attention], inside, sources)
        nodes |= again
        sources |= kept
        if again:
            attentions.add(attention)
    return Remade(frozenset(nodes), frozenset(sources), frozenset(attentions))


def cast_by(reader: fx.Node, node: fx.Node) -> torch.dtype | None:
    """The dtype that autocast gives ``node`` for a product that reads it; ``None``: its own."""
    if reader.target not in PRODUCTS or not is_tensor(node) or not node.meta["val"].is_floating_point():
        return None
    dtype = reader.meta["val"].dtype
    return None if dtype == node.meta["val"].dtype else dtype


def bytes_of(value: Value) -> int:
    """The bytes of a tensor, in the dtype that it is cast to."""
    node, dtype = value
    own = node.meta["val"].dtype
    return bytes_hint(node) * (dtype or own).itemsize // own.itemsize


def _block_numbers(program: Program) -> dict[fx.Node, int]:
    """The block of the ditch stream that a node is traced in."""
    number, found = 1, {}
    for node in program.graph.nodes:
        found[node] = number
        number += node in program.blocks.ends
    return found


def _cut(
    program: Program, attending: Attending, inside: set[fx.Node], kept: set[Value]
) -> tuple[set[fx.Node], set[Value]]:
    """The operations ``inside`` a block that make key and value again, and what they start from; what is ``kept`` costs nothing.
    Of several cuts that take as many bytes the one with the fewest operations."""
    wanted: tuple[Value, ...] = ((attending.key, None), (attending.value, None))
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
    """What may be made again ``inside`` a block, ``wanted`` first, and from what each is made; ``None``: it can't be."""
    found, todo = dict[Value, list[Value] | None](), [*wanted]
    while todo:
        value = node, dtype = todo.pop()
        if value in found:
            continue
        if dtype is not None:
            found[value] = [(node, None)]
        elif node in inside and _is_repeatable(program, node):
            found[value] = [(x, cast_by(node, x)) for x in node.all_input_nodes]
        else:
            found[value] = None
        todo += found[value] or []
    return found


def _is_repeatable(program: Program, node: fx.Node) -> bool:
    """Computed for every token alone, or without tokens, and the same a second time."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or is_random(node):
        return False
    if target is SDPA or node in program.attending:
        return False
    tokens = is_tensor(node) and program.axes.token_dims(node)
    return target.is_view or (is_parallel(program, node) if tokens else is_tensor(node))


def _size(program: Program, value: Value) -> int | None:
    """The bytes that it takes to keep a value; ``None``: it can't be. Nothing: what is there anyway, as inputs without tokens are, and
    what rows read too."""
    (node, _), axes = value, program.axes
    if not is_tensor(node):
        return None if isinstance(node.meta.get("val"), (tuple, list)) else 0
    if node.op == "placeholder" and node not in [program.placeholders[i] for i in program.mutated]:
        return bytes_of(value) if axes.token_dims(node) and node.meta["val"].is_floating_point() else 0
    return bytes_of(value) if axes.token_dims(node) or node in program.activity.live else 0
