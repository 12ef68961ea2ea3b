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
from .rules.op import bytes_hint, is_tensor
from .saving import is_random
from .token_axes import SDPA

_GIVEN, _WANTED = "given", "wanted"


@dataclass(frozen=True)
class Remade:
    """``nodes``: the operations of the program that are done once more. ``sources``: the values of all tokens that they start
    from. ``attentions``: those whose keys or values are made again."""

    nodes: frozenset[fx.Node] = frozenset()
    sources: frozenset[fx.Node] = frozenset()
    attentions: frozenset[fx.Node] = frozenset()


def find_remade(program: Program) -> Remade:
    """What is made again in every block. Reads ``axes``, ``activity``, ``blocks`` and ``attending``."""
    blocks = _block_numbers(program)
    nodes, sources, attentions = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for attention in reversed(
        program.attending
    ):  # one that looks at another block's keys and values keeps them for both
        if attention not in program.activity.live:
            continue
        attending, inside = program.attending[attention], {n for n, b in blocks.items() if b == blocks[attention]}
        again, kept = _cut(program, attending, inside, sources)
        nodes |= again
        sources |= kept
        if again:
            attentions.add(attention)
    return Remade(frozenset(nodes), frozenset(sources), frozenset(attentions))


def _block_numbers(program: Program) -> dict[fx.Node, int]:
    """The block of the ditch stream that a node is traced in."""
    number, found = 1, {}
    for node in program.graph.nodes:
        found[node] = number
        number += node in program.blocks.ends
    return found


def _cut(
    program: Program, attending: Attending, inside: set[fx.Node], kept: set[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The operations ``inside`` a block that make key and value again, and what they start from; what is ``kept`` costs nothing.
    Of several cuts that take as many bytes the one with the fewest operations."""
    flow, wanted = nx.DiGraph(), dict.fromkeys((attending.key, attending.value))
    flow.add_nodes_from((_GIVEN, _WANTED))
    flow.add_edges_from(((node, True), _WANTED) for node in wanted)
    above = _above(wanted, inside, program)
    for node in above:
        repeatable = node in inside and _is_repeatable(program, node)
        size = 0 if node in kept else _size(program, node)
        flow.add_edge((node, False), (node, True), **({} if size is None else {"capacity": size}))
        sources = [(arg, True) for arg in node.all_input_nodes] if repeatable else [_GIVEN]
        flow.add_edges_from((source, (node, False)) for source in sources)
    _, (_, below) = nx.minimum_cut(flow, _GIVEN, _WANTED)
    again = {node for node in above if (node, False) in below}
    read = {*wanted, *(arg for node in again for arg in node.all_input_nodes)} - again
    return again, {node for node in read if _size(program, node)}


def _above(wanted: Iterable[fx.Node], inside: set[fx.Node], program: Program) -> list[fx.Node]:
    """``wanted``, and what may be read to make it again."""
    found, todo = dict[fx.Node, None](), [*wanted]
    while todo:
        node = todo.pop()
        if node not in found:
            found[node] = None
            todo += node.all_input_nodes if node in inside and _is_repeatable(program, node) else []
    return [*found]


def _is_repeatable(program: Program, node: fx.Node) -> bool:
    """Computed for every token alone, or without tokens, and the same a second time."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or target is SDPA or is_random(node):
        return False
    tokens = is_tensor(node) and program.axes.token_dims(node)
    return target.is_view or (is_parallel(program, node) if tokens else is_tensor(node))


def _size(program: Program, node: fx.Node) -> int | None:
    """The bytes that it takes to keep a value; ``None``: it can't be. Nothing: what is there anyway, as inputs without tokens are, and
    what rows read too."""
    if not is_tensor(node):
        return None if isinstance(node.meta.get("val"), (tuple, list)) else 0
    axes, written = program.axes, [program.placeholders[i] for i in program.mutated]
    if node.op == "placeholder" and node not in written:
        held = axes.token_dims(node) and node.meta["val"].is_floating_point()
        return bytes_hint(node) if held else 0
    return bytes_hint(node) if axes.token_dims(node) or node in program.activity.live else 0
