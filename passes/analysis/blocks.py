"""Blocks: the residual stream, the attentions, the entries of their blocks, and the losses.

They are found by dominators. The values on every path from the tokens to the loss are the residual stream, one per
token axis. The block of an attention begins at the last such value before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from ..graph.nodes import is_tensor
from ..graph.program import Program
from .activity import Activity
from .attentions import Attention
from .token_axes import TokenAxes, TokenAxis

aten = torch.ops.aten
_ROOT, _SINK = "root", "sink"
_REPEATS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.repeat.default)


@dataclass(frozen=True)
class Blocks:
    """The residual streams and blocks of a graph.

    Args:
        streams: for each token axis, the values on every path from its tokens to the loss, in order.
        attentions: the attentions of the graph, in order.
        entries: for each attention, the value that its block starts from, on the stream of its keys (of its queries if
            the keys are not tokens); ``None``: the attention is not on a path to the loss.
        losses: live 0-dim outputs.
    """

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
        """Cut points of the ditch stream: every block entry, and the end of the last block of every stream.

        The last block is assumed to be as long as the one before it. Cutting there gives equal blocks equal graphs.
        """
        found = {entry for entry in self.entries if entry is not None}
        for stream in self.streams.values():
            *_, before, last = (-1, -1, *(i for i, node in enumerate(stream) if node in found))
            if before >= 0 and 2 * last - before < len(stream):
                found.add(stream[2 * last - before])
        return frozenset(found)

    def last_entry(self, axes: TokenAxes, axis: TokenAxis) -> fx.Node | None:
        """The input of the last block whose attention reads these tokens: z^(L-1) in TokenSeek."""
        found = zip(self.attentions, self.entries, strict=True)
        return next((entry for a, entry in [*found][::-1] if entry is not None and axes.axis_of(entry) == axis), None)


@dataclass(frozen=True)
class FindBlocks:
    """Find the residual streams and the blocks.

    Reads ``TokenAxes``, ``Activity``; writes ``Blocks``. Without a loss, the live outputs take its place.
    """

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
        """Nothing to verify: no rewrite requires that blocks are found."""


def _has_rows_of(program: Program, node: fx.Node, axis: TokenAxis) -> bool:
    return is_tensor(node) and program[TokenAxes].has_rows_of(axis, node)


def _flow_graph(program: Program, axis: TokenAxis) -> nx.DiGraph:
    """The live values with rows of a token axis and what is computed from them, between a root and a sink.

    Values that attention scores read beside the tokens (a bias per pair of positions, sinks) are not tokens.
    """
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
    """Values that repeat one row for all tokens."""
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
