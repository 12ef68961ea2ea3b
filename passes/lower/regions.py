"""Regions: parts of the seek stream that process each token independently, between operations that mix tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx

from ..analysis.routing import Routes
from ..analysis.row_index import RowIndex, example_sizes
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..attention.positional import PositionalAttentions
from ..graph.fake import fake_mode_of
from ..graph.nodes import bytes_hint, is_tensor, made_by
from ..graph.program import Program
from ..graph.symbolic_sizes import symbols_of
from ..keep.token_parallel import is_parallel, reads
from ..streams.scoring_tail import cut_to
from ..streams.trace import Rewrite


@dataclass(frozen=True)
class Region:
    """Operations of the program (``nodes``) that process each token of an axis independently."""

    program: Program
    axis: TokenAxis
    nodes: tuple[fx.Node, ...]

    @property
    def is_attention(self) -> bool:
        """True if it is a single attention by position."""
        return len(self.nodes) == 1 and self.nodes[0] in self.program[PositionalAttentions]

    @property
    def seek(self) -> dict[fx.Node, fx.Node]:
        """For nodes of the program, the node of the seek stream's value in the rewritten graph."""
        return self.program[Rewrite].seek

    @cached_property
    def rows(self) -> tuple[fx.Node, ...]:
        """The values that it reads row by row."""
        axes, inside = self.program[TokenAxes], {*self.nodes}
        read = [x for node in self.nodes for x, carried in reads(self.program, node) if carried and axes.has_rows(x)]
        return tuple(x for x in dict.fromkeys(read) if x not in inside)

    @cached_property
    def whole(self) -> tuple[fx.Node, ...]:
        """The other values that it reads."""
        inside = {*self.nodes, *self.rows}
        read = dict.fromkeys(x for node in self.nodes for x, _ in reads(self.program, node))
        return tuple(x for x in read if x not in inside)

    @cached_property
    def between(self) -> set[fx.Node]:
        """Further operations that compute ``nodes``: those with several results, and those of routes."""
        routes = {self.program[Routes].to(node) for node in self.nodes} - {None}
        return {*map(made_by, self.nodes), *(node for route in routes for node in route.nodes)} - {*self.nodes}

    @cached_property
    def computed(self) -> tuple[fx.Node, ...]:
        """All tensors that it computes."""
        return tuple(node for node in (*self.nodes, *self.between) if is_tensor(node))

    @cached_property
    def inside(self) -> set[fx.Node]:
        """Its operations in the rewritten graph."""
        ends = {self.seek[node] for node in (*self.rows, *self.whole)}
        inside, todo = set[fx.Node](), [self.seek[node] for node in self.nodes]
        while todo:
            node = todo.pop()
            if node not in ends and node not in inside:
                inside.add(node)
                todo += node.all_input_nodes
        return inside

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The values that are read outside it."""
        return tuple(node for node in self.nodes if not self.inside >= {*self.seek[node].users})

    @cached_property
    def symbols(self) -> list[torch.SymInt]:
        """The symbols in the sizes and strides of the values that it reads and returns."""
        read = [node.meta["val"] for node in (*self.rows, *self.whole, *self.outputs)]
        return symbols_of(
            [*example_sizes(self.program, self.axis), *(size for x in read for size in (*x.shape, *x.stride()))]
        )

    def sizes(self, chunk_bytes: int) -> list[Any]:
        """The sizes of chunks of tokens such that no value inside takes more than ``chunk_bytes``."""
        inner = [bytes_hint(node) for node in self.computed if node not in self.outputs]
        _, tokens = example_sizes(self.program, self.axis)
        return cut_to(tokens, max([1, *inner]), chunk_bytes)

    def row_index(self, size: int, positions: Any = None) -> RowIndex:
        """The row index of ``size`` tokens."""
        batch, tokens = example_sizes(self.program, self.axis)
        with fake_mode_of(self.program.inputs):
            positions = torch.empty(batch, size) if positions is None else positions
        return RowIndex(self.program[TokenAxes], self.axis, positions, batch, tokens)

    def layout(self, node: fx.Node) -> tuple[list[int], int, bool]:
        """The factored sizes of a value, its token dim there, and whether factoring changes its shape.

        In the factored sizes the tokens are a dim of their own.
        """
        axes, shape = self.program[TokenAxes], node.meta["val"].shape
        pieces = self.row_index(1).cut(shape, axes.of(node), axes.row_dim(node))
        at = [kind for kind, _ in pieces].index("token")
        return [size for _, size in pieces], at, len(pieces) > len(shape)

    @property
    def can_stand(self) -> bool:
        """True if all values that it reads are computed before all operations that read its outputs."""
        place = {node: i for i, node in enumerate(self.program[Rewrite].module.graph.nodes)}
        last = max((place[self.seek[node]] for node in (*self.rows, *self.whole)), default=-1)
        users = {user for node in self.outputs for user in self.seek[node].users} - self.inside
        return all(place[user] > last for user in users)


def regions_of(program: Program, chunk_bytes: int) -> list[Region]:
    """All regions: connected operations with the same number of mixing operations before them.

    An attention whose result takes at most ``chunk_bytes`` is a region of its own.
    """
    there, seek = {*program[Rewrite].module.graph.nodes}, program[Rewrite].seek
    small = {node for node in program[PositionalAttentions] if bytes_hint(node) <= chunk_bytes}
    levels: dict[fx.Node, int] = {}
    found: dict[tuple[int, TokenAxis, fx.Node | None], list[fx.Node]] = {}
    for node in program.graph.nodes:
        if seek.get(node) not in there:
            continue
        parallel = is_parallel(program, node) and not _reads_a_float(node)
        read = [(levels.get(x, -1), carried and x not in small) for x, carried in reads(program, node)]
        if parallel:
            levels[node] = max([0, *(level if carried else level + 1 for level, carried in read)])
            alone = node if node in small else None
            found.setdefault((levels[node], program[TokenAxes].axis_of(node), alone), []).append(node)
        elif (level := max((level for level, _ in read), default=-1)) >= 0:
            levels[node] = level + 1
    return [Region(program, key[1], part) for key, nodes in found.items() for part in _connected(program, nodes)]


def _reads_a_float(node: fx.Node) -> bool:
    """True for an operation with a float that is read from a tensor (``dynamic=True``), which no subgraph can take."""
    return any(isinstance(arg.meta.get("val"), torch.SymFloat) for arg in node.all_input_nodes)


def _connected(program: Program, nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, ...]]:
    """The connected components of ``nodes``, each in order."""
    inside = {*nodes}
    graph: nx.Graph[fx.Node] = nx.Graph((x, node) for node in nodes for x, _ in reads(program, node) if x in inside)
    graph.add_nodes_from(nodes)
    for part in nx.connected_components(graph):
        yield tuple(node for node in nodes if node in part)


def are_large(regions: Sequence[Region], chunk_bytes: int) -> bool:
    """True if some value in a region takes more than ``chunk_bytes``."""
    return any(bytes_hint(node) > chunk_bytes for region in regions for node in region.computed)


def cut_alike(regions: Sequence[Region], chunk_bytes: int) -> list[tuple[Region, list[Any]]]:
    """Regions with their chunks of tokens; all regions of an axis that are cut have the same number of chunks.

    So chunks can be passed from one region to the next. The number is that of the region that needs most.
    """
    cut = [(region, region.sizes(chunk_bytes)) for region in regions]
    most = {region.axis: sizes for region, sizes in sorted(cut, key=lambda pair: len(pair[1]))}
    return [(region, most[region.axis] if len(sizes) > 1 else sizes) for region, sizes in cut]
