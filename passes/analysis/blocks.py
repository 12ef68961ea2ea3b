"""Blocks: the residual stream, the attentions, the entry of the last block, the losses.

Found by dominators: the values that every path from the tokens to the loss goes through are the residual stream (one for
each token axis); the block of an attention begins at the last of them before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from ..graph.nodes import is_tensor
from ..graph.program import Program
from .activity import Activity
from .token_axes import Attention, TokenAxes, TokenAxis

aten = torch.ops.aten
_ROOT, _SINK = "root", "sink"
_REPEATS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.repeat.default)


@dataclass(frozen=True)
class Blocks:
    """``streams``: for each token axis the values that every path from its tokens to the loss goes through, in order.
    ``entries``: for each attention, the value of its keys' stream (of its queries', where the keys are no tokens) that its
    block starts from (None: the attention is not on the way to the loss)."""

    streams: dict[TokenAxis, tuple[fx.Node, ...]]
    attentions: tuple[Attention, ...]
    entries: tuple[fx.Node | None, ...]
    losses: tuple[fx.Node, ...]

    @property
    def stream(self) -> frozenset[fx.Node]:
        """The residual streams of all token axes."""
        return frozenset().union(*self.streams.values())

    @property
    def ends(self) -> frozenset[fx.Node]:
        """The values that the ditch stream is cut behind, so that blocks alike give graphs alike: the entries, and in every
        stream the value that lies as far behind the last entry as this lies behind the one before it, where the head begins."""
        found = {entry for entry in self.entries if entry is not None}
        for stream in self.streams.values():
            *_, before, last = (-1, -1, *(i for i, node in enumerate(stream) if node in found))
            if before >= 0 and 2 * last - before < len(stream):
                found.add(stream[2 * last - before])
        return frozenset(found)

    def last_entry(self, axes: TokenAxes, axis: TokenAxis) -> fx.Node | None:
        """The input of the last block that looks at these tokens: TokenSeek's z^(L-1)."""
        found = zip(self.attentions, self.entries, strict=True)
        return next((entry for a, entry in [*found][::-1] if entry is not None and axes.axis_of(entry) == axis), None)


@dataclass(frozen=True)
class FindBlocks:
    """Dominators of the loss (or of the live outputs). Reads ``axes``, ``activity``; writes ``blocks``."""

    name: str = "blocks"

    def run(self, program: Program) -> Program:
        streams, entries = {}, {}
        for axis in program[TokenAxes].tokens:
            above = nx.immediate_dominators(_flow_graph(program, axis), _ROOT)
            streams[axis] = tuple(n for n in _path(above, _SINK) if _has_rows_of(program, n, axis))[::-1]
            for a in program[TokenAxes].attentions:
                if (program[TokenAxes].keys_of(a) or program[TokenAxes].queries_of(a)) == axis:
                    entries[a.node] = next((node for node in _path(above, a.node) if node in streams[axis]), None)
        found = tuple(entries.get(a.node) for a in program[TokenAxes].attentions)
        blocks = Blocks(streams, program[TokenAxes].attentions, found, program[Activity].losses)
        return program.with_(blocks)

    def check(self, program: Program) -> None:
        """Nothing to verify: no later rewrite depends on the blocks being there."""


def _has_rows_of(program: Program, node: fx.Node, axis: TokenAxis) -> bool:
    return is_tensor(node) and program[TokenAxes].has_rows_of(axis, node)


def _flow_graph(program: Program, axis: TokenAxis) -> nx.DiGraph:
    """The live values with rows of a token axis and what they flow into, between a root and a sink. What scores of an attention are
    given beside its tokens (a bias of each pair of positions, sinks) is no token."""
    live, alike = program[Activity].live, _alike_for_all_tokens(program, axis)
    flow = nx.DiGraph()
    flow.add_nodes_from([_ROOT, _SINK])
    for node in program.graph.nodes:
        if node not in live:
            continue
        sources = [arg for arg in node.all_input_nodes if arg in flow]
        of_tokens = (
            _has_rows_of(program, node, axis) and node not in alike and len(program[TokenAxes].token_dims(node)) == 1
        )
        if sources or of_tokens:
            flow.add_edges_from((source, node) for source in sources or [_ROOT])
    ends = program[Activity].losses or [out for out in program.outputs if out in flow]
    flow.add_edges_from((end, _SINK) for end in ends if end in flow)
    return flow


def _alike_for_all_tokens(program: Program, axis: TokenAxis) -> set[fx.Node]:
    """Values whose rows are one row, repeated."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and _has_rows_of(program, node, axis):
            rows = [arg for arg in node.all_input_nodes if _has_rows_of(program, arg, axis)]
            if found.issuperset(rows) if rows else node.target in _REPEATS:
                found.add(node)
    return found


def _path(above: dict, node: object) -> list[fx.Node]:
    """The dominators of ``node``, nearest first, without root and sink."""
    found = []
    while node in above and above[node] not in (node, _ROOT, None):
        node = above[node]
        found.append(node)
    return found
