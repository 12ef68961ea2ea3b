"""Chunks: run the token-parallel regions of the seek stream on one chunk of tokens after another.

Between two operations that mix tokens, the seek stream processes each token independently: projections, MLP, norms, and
also attention, for every query. A region with large intermediate values becomes calls of one subgraph, one for every
chunk of tokens, so that only its outputs exist for all tokens. Equal layers share a subgraph. An attention with a small
result is not cut, since it is faster with all queries at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._subclasses.fake_tensor import FakeTensor

from ..analysis.activity import Activity
from ..analysis.row_index import example_sizes
from ..analysis.token_axes import TokenAxes
from ..capture.retrace import is_autocast
from ..graph.emit import emit
from ..graph.errors import InvariantBroken, TokenSeekError
from ..graph.nodes import bytes_hint
from ..graph.program import Program
from ..graph.symbolic_sizes import Numbers
from ..streams.subgraph import RowSubgraph, trace_whole
from ..streams.trace import Rewrite
from .regions import Region, are_large, cut_alike, regions_of

aten = torch.ops.aten
#: Bytes that a value inside a region may take: about the caches of a CPU; a GPU needs larger values to be busy.
CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class ChunkedPrefill:
    """``spare_bytes``: how much the kept rows may save without raising the peak of the chunked prefill.

    It is 0 if nothing is cut.
    """

    spare_bytes: int = 0


@dataclass(frozen=True)
class Chunk:
    """Run the token-parallel regions of the seek stream in chunks of tokens.

    Reads and writes ``Rewrite``; writes ``ChunkedPrefill``. A symbolic length is cut into as many chunks as the example
    is.

    Args:
        chunk_bytes: bytes that a value inside a region may take; ``None``: ``CHUNK_BYTES`` of the device.
    """

    chunk_bytes: int | None = None
    name: str = "chunks"

    def run(self, program: Program) -> Program:
        rewrite = program[Rewrite].copied()
        program, module = program.with_(rewrite), rewrite.module
        chunk_bytes = self.chunk_bytes or default_bytes(rewrite.inputs)
        number = Numbers(module.graph, rewrite.inputs)
        regions = regions_of(program, chunk_bytes)
        large = are_large(regions, chunk_bytes)
        spare_bytes = _spare_bytes(program, chunk_bytes) if large else 0
        cut = cut_alike(regions, chunk_bytes)
        bodies = _Bodies(module, {node for region, sizes in cut if len(sizes) > 1 for node in region.inside})
        for region, sizes in cut:
            wanted = len(sizes) > 1 or (large and region.is_attention)
            if wanted and region.can_stand and number.knows(region.symbols):
                _call_in_chunks(region, sizes, bodies, number)
        for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default  # joined chunks may have another layout
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_autocast(node))
        module.recompile()
        return program.with_(ChunkedPrefill(spare_bytes))

    def check(self, program: Program) -> None:
        """The graph is well-formed."""
        program[Rewrite].module.graph.lint()


def _spare_bytes(program: Program, chunk_bytes: int) -> int:
    """Spare bytes: how much the kept rows may save without raising the peak that chunked prefill sets.

    Beside keys and values, the prefill briefly holds three chunks: two inside (gate and up), and the input and output
    of the region. Backward begins with the gradient of the head's weight; its bytes beyond one chunk are not spare.
    """
    return min(3 * chunk_bytes, max(0, 4 * chunk_bytes - _gradient_of_head(program)))


def _gradient_of_head(program: Program) -> int:
    """Bytes of the largest trained parameter that is read after the last attention."""
    attentions = {a.node for a in program[TokenAxes].attentions}
    behind = {*takewhile(lambda node: node not in attentions, reversed(program.graph.nodes))}
    return max((bytes_hint(p) for p in program[Activity].trainable if not behind.isdisjoint(p.users)), default=0)


def default_bytes(inputs: Sequence[Any]) -> int:
    """``CHUNK_BYTES`` of the device of these inputs."""
    devices = {x.device.type for x in inputs if isinstance(x, Tensor)}
    return CHUNK_BYTES["cuda" if "cuda" in devices else "cpu"]


class _Bodies:
    """The subgraphs of a module; equal ones are stored once.

    Args:
        module: the module.
        inside: the operations of regions that are cut.

    ``chunks`` has the chunks of values that only ``inside`` reads, by value and sizes. Other values are joined anyway,
    and held once if they are cut again.
    """

    def __init__(self, module: fx.GraphModule, inside: Set[fx.Node]) -> None:
        self.module, self.inside, self._known = module, inside, dict[Any, str]()
        self.chunks = dict[tuple[fx.Node, str], list[fx.Node]]()

    def call(self, body: fx.GraphModule, examples: Sequence[Any], operands: Sequence[Any], like: fx.Node) -> fx.Node:
        """Add a call of ``body``, which was traced with ``examples``, at the graph's insertion point."""
        name, graph = self._named(body, examples), self.module.graph
        call = graph.call_function(invoke_subgraph, (graph.get_attr(name), name, *operands))
        results: Any = body.graph.output_node().args[0]
        call.meta = {**like.meta, "val": tuple(node.meta["val"] for node in results)}
        return call

    def _named(self, body: fx.GraphModule, inputs: Sequence[Any]) -> str:
        key = (body.code, *(f"{x.shape} {x.stride()} {x.dtype}" for x in inputs if isinstance(x, Tensor)))
        if [*body.named_buffers()]:  # it has constants
            key = id(body)
        if key not in self._known:
            self._known[key] = f"chunk_{len(self._known)}"
            setattr(self.module, self._known[key], body)
        return self._known[key]


def _call_in_chunks(region: Region, sizes: Sequence[Any], bodies: _Bodies, number: Numbers) -> None:
    """Replace a region by calls of a subgraph; a region that can't be traced on a chunk stays."""
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


def _chunk(region: Region, node: fx.Node, sizes: Sequence[Any], i: int, bodies: _Bodies, number: Numbers) -> fx.Node:
    """A chunk of a value that a region reads: the chunk as it was computed, or cut from the whole value."""
    whole = region.seek[node]
    apply = partial(number.emit, whole)
    if parts := bodies.chunks.get((whole, str(sizes))):
        return apply(aten.contiguous.default, parts[i])
    return _rows(region, node, sum(sizes[:i]), sizes[i], apply)


def _positions(region: Region, like: fx.Node, start: Any, size: Any, number: Numbers) -> fx.Node:
    """The positions of ``size`` tokens from ``start`` on, for every instance."""
    batch, _ = example_sizes(region.program, region.axis)
    positions = number.emit(like, aten.arange.start, start, start + size, device=like.meta["val"].device)
    return number.emit(like, aten.expand.default, positions, [batch, size])


def _rows(region: Region, node: fx.Node, start: Any, size: Any, apply: Callable[..., fx.Node]) -> fx.Node:
    """The rows of a value from ``start`` on, contiguous in any layout of the value; ``apply`` adds an operation."""
    (sizes, at, is_cut), whole = region.layout(node), region.seek[node]
    if not is_cut:
        return apply(aten.contiguous.default, apply(aten.slice.Tensor, whole, at, start, start + size))
    pieces = apply(aten.slice.Tensor, apply(aten.reshape.default, whole, sizes), at, start, start + size)
    shape = region.row_index(size).row_shape(node.meta["val"].shape, region.program[TokenAxes].row_dim(node))
    return apply(aten.contiguous.default, apply(aten.reshape.default, pieces, shape))


def _joined(region: Region, node: fx.Node, parts: list[fx.Node], apply: Callable[..., fx.Node]) -> fx.Node:
    """The value of ``node`` from its chunks."""
    sizes, at, is_cut = region.layout(node)
    if is_cut:
        cut = [-1 if i == at else size for i, size in enumerate(sizes)]
        parts = [apply(aten.reshape.default, part, cut) for part in parts]
    whole = apply(aten.cat.default, parts, at) if len(parts) > 1 else parts[0]
    return apply(aten.reshape.default, whole, list(node.meta["val"].shape)) if is_cut else whole


def _after(node: fx.Node) -> fx.Node:
    """The next place where a call may be inserted."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def _trace(region: Region, size: Any, read: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[Any]]:
    """Trace a region on ``size`` tokens: (positions, *rows, *whole, *symbols) -> outputs.

    ``read``: the arguments of the call without the symbols.

    Returns:
        The graph and its example inputs.
    """

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
        raise InvariantBroken("A region reads a tensor that is not one of its inputs.")
    return module, inputs
