"""Chunks: what the seek stream does token by token, done for a chunk of tokens after the other.

Between two places where tokens mix the seek stream works on every token alone (projections, MLP, norms; attention too looks
from every query alone). Such a region, where its values inside are large, becomes calls of one subgraph, one for every chunk
of tokens: only what comes out of it exists for all tokens. Layers that are alike share the subgraph. An attention whose result is
small is not cut: it is faster with all queries at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._subclasses.fake_tensor import FakeTensor

from ..analysis.activity import Activity
from ..analysis.routing import Routes
from ..analysis.row_index import RowIndex, example_sizes
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..attention.positional import PositionalAttentions
from ..capture.canonicalize import is_autocast
from ..graph.emit import emit
from ..graph.errors import InvariantBroken, TokenSeekError
from ..graph.fake import fake_mode_of
from ..graph.nodes import bytes_hint, is_tensor, made_by
from ..graph.program import Program
from ..graph.symbolic_sizes import Numbers, symbols_of
from ..keep.token_parallel import is_parallel, reads
from ..streams.scoring_tail import cut_to
from ..streams.subgraph import RowSubgraph, trace_whole
from ..streams.trace import Rewrite

aten = torch.ops.aten
#: What a value inside a region may take: about what a CPU's caches hold; a GPU is busy with larger ones only.
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class ChunkedPrefill:
    """``spare_bytes``: how much the kept rows may save without raising the peak that chunked prefill sets; 0 where nothing is cut."""

    spare_bytes: int = 0


@dataclass(frozen=True)
class Chunk:
    """Cut the regions of the seek stream so that no value inside one takes more than ``chunk_bytes`` (``None``: ``CHUNK_BYTES`` of
    the device). Reads and writes ``rewrite``. A length that is a symbol is cut into as many chunks as the example would be."""

    chunk_bytes: int | None = None
    name: str = "chunks"

    def run(self, program: Program) -> Program:
        rewrite = program[Rewrite].copied()
        program, module = program.with_(rewrite), rewrite.module
        chunk_bytes = self.chunk_bytes or default_bytes(rewrite.inputs)
        number = Numbers(module.graph, rewrite.inputs)
        regions = _regions(program, chunk_bytes)
        spare_bytes = _spare_bytes(program, regions, chunk_bytes)
        large = _are_large(regions, chunk_bytes)
        cut = _cut_alike(regions, chunk_bytes)
        bodies = _Bodies(module, {node for region, sizes in cut if len(sizes) > 1 for node in region.inside})
        for region, sizes in cut:
            wanted = len(sizes) > 1 or (large and region.is_attention)
            if wanted and region.can_stand and number.knows(region.symbols):
                _call_in_chunks(region, sizes, bodies, number)
        for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default  # what chunks are joined to may have another layout
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_autocast(node))
        module.recompile()
        return program.with_(ChunkedPrefill(spare_bytes))

    def check(self, program: Program) -> None:
        """The graph is well-formed."""
        program[Rewrite].module.graph.lint()


def _spare_bytes(program: Program, regions: Sequence[_Region], chunk_bytes: int) -> int:
    """Spare bytes: how much the kept rows may save without raising the peak that chunked prefill sets.

    Beside keys and values the prefill holds three chunks for a moment: two inside (gate and up), and what enters and leaves. The backward
    begins with the gradient of the head's weight; what that takes beyond one chunk is not spare.
    """
    if not _are_large(regions, chunk_bytes):
        return 0
    return min(3 * chunk_bytes, max(0, 4 * chunk_bytes - _gradient_of_head(program)))


def _gradient_of_head(program: Program) -> int:
    """Bytes of the largest trained parameter that is read behind the last attention."""
    attentions = {a.node for a in program[TokenAxes].attentions}
    behind = {*takewhile(lambda node: node not in attentions, reversed(program.graph.nodes))}
    return max((bytes_hint(p) for p in program[Activity].trainable if not behind.isdisjoint(p.users)), default=0)


def default_bytes(inputs: Sequence[Any]) -> int:
    """``CHUNK_BYTES`` of the device that inputs are on."""
    devices = {x.device.type for x in inputs if isinstance(x, Tensor)}
    return CHUNK_BYTES["cuda" if "cuda" in devices else "cpu"]


@dataclass(frozen=True)
class _Region:
    """Operations of the program (``nodes``) that work on every token of an axis alone, between places where tokens mix."""

    program: Program
    axis: TokenAxis
    nodes: tuple[fx.Node, ...]

    @property
    def is_attention(self) -> bool:
        """Whether it is one attention and nothing else."""
        return len(self.nodes) == 1 and self.nodes[0] in self.program[PositionalAttentions]

    @property
    def seek(self) -> dict[fx.Node, fx.Node]:
        return self.program[Rewrite].seek

    @cached_property
    def rows(self) -> tuple[fx.Node, ...]:
        """What it reads row by row."""
        axes, inside = self.program[TokenAxes], {*self.nodes}
        read = [x for node in self.nodes for x, carried in reads(self.program, node) if carried and axes.has_rows(x)]
        return tuple(x for x in dict.fromkeys(read) if x not in inside)

    @cached_property
    def whole(self) -> tuple[fx.Node, ...]:
        """What else it reads."""
        inside = {*self.nodes, *self.rows}
        read = dict.fromkeys(x for node in self.nodes for x, _ in reads(self.program, node))
        return tuple(x for x in read if x not in inside)

    @cached_property
    def between(self) -> set[fx.Node]:
        """What is computed on the way to them: operations with several results, and what sorts rows and brings them back."""
        routes = {self.program[Routes].to(node) for node in self.nodes} - {None}
        return {*map(made_by, self.nodes), *(node for route in routes for node in route.nodes)} - {*self.nodes}

    @cached_property
    def computed(self) -> tuple[fx.Node, ...]:
        """All that it computes."""
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
        """What is read outside of it."""
        return tuple(node for node in self.nodes if not self.inside >= {*self.seek[node].users})

    @cached_property
    def symbols(self) -> list[torch.SymInt]:
        """What sizes of what it reads and gives are made of."""
        read = [node.meta["val"] for node in (*self.rows, *self.whole, *self.outputs)]
        return symbols_of(
            [*example_sizes(self.program, self.axis), *(size for x in read for size in (*x.shape, *x.stride()))]
        )

    def sizes(self, chunk_bytes: int) -> list[Any]:
        """The chunks of tokens in which no value inside takes more than ``chunk_bytes``."""
        inner = [bytes_hint(node) for node in self.computed if node not in self.outputs]
        _, tokens = example_sizes(self.program, self.axis)
        return cut_to(tokens, max([1, *inner]), chunk_bytes)

    def row_index(self, size: int, positions: Any = None) -> RowIndex:
        """That of ``size`` tokens."""
        batch, tokens = example_sizes(self.program, self.axis)
        with fake_mode_of(self.program.inputs):
            positions = torch.empty(batch, size) if positions is None else positions
        return RowIndex(self.program[TokenAxes], self.axis, positions, batch, tokens)

    def layout(self, node: fx.Node) -> tuple[list[int], int, bool]:
        """The sizes of a value with the tokens as a dim of their own, which dim, and whether they share one as it is."""
        axes, shape = self.program[TokenAxes], node.meta["val"].shape
        pieces = self.row_index(1).cut(shape, axes.of(node), axes.row_dim(node))
        at = [kind for kind, _ in pieces].index("token")
        return [size for _, size in pieces], at, len(pieces) > len(shape)

    @property
    def can_stand(self) -> bool:
        """Whether all that it reads comes before all that reads it."""
        place = {node: i for i, node in enumerate(self.program[Rewrite].module.graph.nodes)}
        last = max((place[self.seek[node]] for node in (*self.rows, *self.whole)), default=-1)
        users = {user for node in self.outputs for user in self.seek[node].users} - self.inside
        return all(place[user] > last for user in users)


def _regions(program: Program, chunk_bytes: int) -> list[_Region]:
    """All regions: what is connected of what has as many mixing operations before it. An attention that gives no more than ``chunk_bytes``
    is one."""
    there, seek = {*program[Rewrite].module.graph.nodes}, program[Rewrite].seek
    small = {node for node in program[PositionalAttentions] if bytes_hint(node) <= chunk_bytes}
    levels: dict[fx.Node, int] = {}
    found: dict[tuple[int, TokenAxis, fx.Node | None], list[fx.Node]] = {}
    for node in program.graph.nodes:
        if seek.get(node) not in there:
            continue
        parallel = is_parallel(program, node)
        read = [(levels.get(x, -1), carried and x not in small) for x, carried in reads(program, node)]
        if parallel:
            levels[node] = max([0, *(level if carried else level + 1 for level, carried in read)])
            alone = node if node in small else None
            found.setdefault((levels[node], program[TokenAxes].axis_of(node), alone), []).append(node)
        elif (level := max((level for level, _ in read), default=-1)) >= 0:
            levels[node] = level + 1
    return [_Region(program, key[1], part) for key, nodes in found.items() for part in _connected(program, nodes)]


def _connected(program: Program, nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, ...]]:
    """The parts of ``nodes`` between which nothing goes, each in order."""
    inside = {*nodes}
    graph: nx.Graph[fx.Node] = nx.Graph((x, node) for node in nodes for x, _ in reads(program, node) if x in inside)
    graph.add_nodes_from(nodes)
    for part in nx.connected_components(graph):
        yield tuple(node for node in nodes if node in part)


def _are_large(regions: Sequence[_Region], chunk_bytes: int) -> bool:
    return any(bytes_hint(node) > chunk_bytes for region in regions for node in region.computed)


def _cut_alike(regions: Sequence[_Region], chunk_bytes: int) -> list[tuple[_Region, list[Any]]]:
    """Regions with their chunks of tokens: those of an axis that are cut are cut into as many as the one that needs most, so that chunks go
    from one to the next as they are."""
    cut = [(region, region.sizes(chunk_bytes)) for region in regions]
    most = {region.axis: sizes for region, sizes in sorted(cut, key=lambda pair: len(pair[1]))}
    return [(region, most[region.axis] if len(sizes) > 1 else sizes) for region, sizes in cut]


class _Bodies:
    """The subgraphs of a module: traced ones that are alike are one. ``inside``: the operations of regions that are cut. ``chunks``: of
    values that nothing but those reads, by value and sizes; what others read is joined anyway, and held once where it is cut again."""

    def __init__(self, module: fx.GraphModule, inside: Set[fx.Node]) -> None:
        self.module, self.inside, self._known = module, inside, dict[Any, str]()
        self.chunks = dict[tuple[fx.Node, str], list[fx.Node]]()

    def call(self, body: fx.GraphModule, examples: Sequence[Any], operands: Sequence[Any], like: fx.Node) -> fx.Node:
        """A call of ``body``, which was traced with ``examples``, where the graph inserts."""
        name, graph = self._named(body, examples), self.module.graph
        call = graph.call_function(invoke_subgraph, (graph.get_attr(name), name, *operands))
        results: Any = body.graph.output_node().args[0]
        call.meta = {**like.meta, "val": tuple(node.meta["val"] for node in results)}
        return call

    def _named(self, body: fx.GraphModule, inputs: Sequence[Any]) -> str:
        key = (body.code, *(f"{x.shape} {x.stride()} {x.dtype}" for x in inputs if isinstance(x, Tensor)))
        if [*body.named_buffers()]:  # it holds constants
            key = id(body)
        if key not in self._known:
            self._known[key] = f"chunk_{len(self._known)}"
            setattr(self.module, self._known[key], body)
        return self._known[key]


def _call_in_chunks(region: _Region, sizes: Sequence[Any], bodies: _Bodies, number: Numbers) -> None:
    """Replace a region by calls of a subgraph; one that can't be cut after all stays."""
    graph, seek = bodies.module.graph, region.seek
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max((seek[node] for node in (*region.rows, *region.whole)), key=order.__getitem__)
    like, calls = seek[region.nodes[-1]], list[fx.Node]()
    with graph.inserting_before(_after(last)):
        read = [
            [
                _positions(region, like, sum(sizes[:i]), size, number),
                *(_chunk(region, node, sizes, i, bodies, number) for node in region.rows),
                *(seek[node] for node in region.whole),
            ]
            for i, size in enumerate(sizes)
        ]
        try:
            traced = {str(sizes[i]): _trace(region, sizes[i], read[i]) for i in (0, -1)}
        except TokenSeekError:
            return
        symbols = [*map(number, region.symbols)]
        for size, operands in zip(sizes, read, strict=True):
            calls.append(bodies.call(*traced[str(size)], [*operands, *symbols], like))
        for i, node in enumerate(region.outputs):
            parts = [emit(seek[node], operator.getitem, call, i) for call in calls]
            joined = _joined(region, node, parts, partial(number.emit, seek[node]))
            if bodies.inside.issuperset(seek[node].users):
                bodies.chunks[joined, str(sizes)] = parts
            seek[node].replace_all_uses_with(joined, lambda user: user not in region.inside)
            seek[node] = joined


def _chunk(region: _Region, node: fx.Node, sizes: Sequence[Any], i: int, bodies: _Bodies, number: Numbers) -> fx.Node:
    """A chunk of what a region reads: as it was made, or cut from the whole."""
    whole = region.seek[node]
    apply = partial(number.emit, whole)
    if parts := bodies.chunks.get((whole, str(sizes))):
        return apply(aten.contiguous.default, parts[i])
    return _rows(region, node, sum(sizes[:i]), sizes[i], apply)


def _positions(region: _Region, like: fx.Node, start: Any, size: Any, number: Numbers) -> fx.Node:
    """Those of the tokens from ``start`` on, of every instance."""
    batch, _ = example_sizes(region.program, region.axis)
    positions = number.emit(like, aten.arange.start, start, start + size, device=like.meta["val"].device)
    return number.emit(like, aten.expand.default, positions, [batch, size])


def _rows(region: _Region, node: fx.Node, start: Any, size: Any, apply: Callable[..., fx.Node]) -> fx.Node:
    """The rows of a value from ``start`` on, contiguous whatever its layout is when it is computed; ``apply`` calls an operation."""
    (sizes, at, is_cut), whole = region.layout(node), region.seek[node]
    if not is_cut:
        return apply(aten.contiguous.default, apply(aten.slice.Tensor, whole, at, start, start + size))
    pieces = apply(aten.slice.Tensor, apply(aten.reshape.default, whole, sizes), at, start, start + size)
    shape = region.row_index(size).row_shape(node.meta["val"].shape, region.program[TokenAxes].row_dim(node))
    return apply(aten.contiguous.default, apply(aten.reshape.default, pieces, shape))


def _joined(region: _Region, node: fx.Node, parts: list[fx.Node], apply: Callable[..., fx.Node]) -> fx.Node:
    """The value of ``node`` from its chunks."""
    sizes, at, is_cut = region.layout(node)
    if is_cut:
        cut = [-1 if i == at else size for i, size in enumerate(sizes)]
        parts = [apply(aten.reshape.default, part, cut) for part in parts]
    whole = apply(aten.cat.default, parts, at) if len(parts) > 1 else parts[0]
    return apply(aten.reshape.default, whole, list(node.meta["val"].shape)) if is_cut else whole


def _after(node: fx.Node) -> fx.Node:
    """The next place where a call may stand."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def _trace(region: _Region, size: Any, read: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[Any]]:
    """(positions, *rows, *whole, *symbols) -> outputs for ``size`` tokens, and examples of its inputs; ``read``: what it is called with but
    for the symbols."""

    def body(positions: Tensor, *args: Any) -> tuple[Tensor, ...]:
        rows = dict(zip(region.rows, args, strict=False))
        known = dict(zip(region.whole, args[len(rows) :], strict=False))
        part = RowSubgraph(
            region.program, (*region.nodes, *region.between), known, region.row_index(size, positions), rows
        )
        part.run()
        return tuple(part.rows_of(node) for node in region.outputs)

    inputs = [*(node.meta["val"] for node in read), *region.symbols]
    with torch.no_grad():
        module = trace_whole(body, inputs)
    if any(isinstance(x, FakeTensor) for x in module.buffers()):
        raise InvariantBroken("A region reads a value that it does not name.")
    return module, inputs
