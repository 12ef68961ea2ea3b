"""Blocks: the residual stream, the attentions, the entry of the last block, the losses.

Found by dominators: the values that every path from the input to the loss goes through are the residual stream; the block
of an attention begins at the last of them before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
from torch import fx

from .program import Program
from .token_axes import Attention

_ROOT, _SINK = "root", "sink"


@dataclass(frozen=True)
class Blocks:
    """``stream``: values on every path to the loss, in order. ``entries``: for each attention, the stream's value that its
    block starts from (None: the attention is not on the way to the loss)."""

    stream: tuple[fx.Node, ...]
    attentions: tuple[Attention, ...]
    entries: tuple[fx.Node | None, ...]
    losses: tuple[fx.Node, ...]

    @property
    def last_entry(self) -> fx.Node | None:
        """The input of the last block: TokenSeek's z^(L-1)."""
        return next((entry for entry in reversed(self.entries) if entry is not None), None)


@dataclass(frozen=True)
class FindBlocks:
    """Dominators of the loss (or of the live outputs). Reads ``axes``, ``activity``; writes ``blocks``."""

    name: str = "blocks"

    def run(self, program: Program) -> Program:
        assert program.axes is not None and program.activity is not None
        flow = _flow_graph(program)
        above = nx.immediate_dominators(flow, _ROOT)
        stream = [node for node in _path(above, _SINK) if program.axes.has_rows(node)][::-1]
        entries = tuple(
            next((node for node in _path(above, a.node) if node in stream), None) if a.node in above else None
            for a in program.axes.attentions
        )
        blocks = Blocks(tuple(stream), program.axes.attentions, entries, program.activity.losses)
        return replace(program, blocks=blocks)

    def check(self, program: Program) -> None:
        """Nothing to verify: no later rewrite depends on the blocks being there."""


def _flow_graph(program: Program) -> nx.DiGraph:
    """The live values with rows and what they flow into, between a root and a sink."""
    live, axes = program.activity.live, program.axes
    flow = nx.DiGraph()
    flow.add_nodes_from([_ROOT, _SINK])
    for node in program.graph.nodes:
        if node not in live:
            continue
        sources = [arg for arg in node.all_input_nodes if arg in flow]
        if sources or axes.has_rows(node):
            flow.add_edges_from((source, node) for source in sources or [_ROOT])
    ends = program.activity.losses or [out for out in program.outputs if out in flow]
    flow.add_edges_from((end, _SINK) for end in ends if end in flow)
    return flow


def _path(above: dict, node: object) -> list[fx.Node]:
    """The dominators of ``node``, nearest first, without root and sink."""
    found = []
    while node in above and above[node] not in (node, _ROOT, None):
        node = above[node]
        found.append(node)
    return found
