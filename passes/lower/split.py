"""Split: cut the rewritten graph into segments that are compiled one by one and run in order.

The first segment has the operations without gradient: the seek stream and the selection. One segment follows for every
block of the ditch stream. Autograd then runs their backwards one after another: it accumulates the gradients of a block
and frees its keys and values before those of the next block exist. Equal blocks give equal graphs, including the names.
Keys and values that are parts of one product with the queries are copied, since views would keep the queries of all
tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx.experimental.symbolic_shapes import free_symbols

from ..graph.emit import emit
from ..graph.errors import InvariantBroken
from ..graph.fake import fake_mode_of
from ..graph.kinds import block_of, without_block
from ..graph.nodes import bytes_hint, hint, is_tensor
from ..graph.program import Program
from ..graph.strides import copied_in_order, order_in_memory
from ..graph.symbolic_sizes import canonical_symint, places_of_symbols
from ..streams.rounds import Rounds
from ..streams.trace import Rewrite

Run = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """One segment, ``run(*takes) -> gives``.

    Args:
        run: the graph, or its compiled function.
        takes: its inputs: nodes of the whole graph, and symbols of sizes.
        gives: its outputs.
        last: the inputs that no later segment takes.
    """

    run: Run
    takes: tuple[Any, ...]
    gives: tuple[fx.Node, ...]
    last: frozenset


@dataclass(frozen=True)
class Segments:
    """A graph in segments. Called with the inputs of the graph, it returns the outputs.

    Args:
        inputs: example inputs.
        placeholders: the placeholders of the graph.
        sizes: where the inputs have the symbols that segments take: the position of an input and its dim (``None``: it
            is a number).
        segments: the segments, in order.
        outputs: the outputs of the graph.
        phases: the number of the first segment of every phase of the rounds; empty if the rows run in the forward.
    """

    inputs: tuple[Any, ...]
    placeholders: tuple[fx.Node, ...]
    sizes: dict[sympy.Symbol, tuple[int, int | None]]
    segments: tuple[Segment, ...]
    outputs: tuple[Any, ...]
    phases: tuple[int, ...] = ()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return self._each(run_segment, args)

    def known(self, args: Sequence[Any]) -> dict[Any, Any]:
        """The values that the segments start from: the inputs, and the sizes that they have."""
        values: dict[Any, Any] = dict(zip(self.placeholders, args, strict=True))
        return values | {s: args[i] if dim is None else args[i].shape[dim] for s, (i, dim) in self.sizes.items()}

    def on_examples(self, look: Callable[[Segment, list, Sequence[Any]], None]) -> None:
        """Call ``look(segment, example inputs, example outputs)`` for every segment.

        Each call has its own tracing context.
        """
        mode = detect_fake_mode(self.inputs)

        def run(segment: Segment, taken: list) -> Sequence[Any]:
            taken = [canonical_symint(x) for x in taken]
            # some composite operations accept symbolic sizes only in Python
            with fake_mode_of(self.inputs), enable_python_dispatcher():
                given = segment.run(*taken)
            with tracing(TracingContext(mode)):
                look(segment, taken, given)
            return given

        self._each(run, self.inputs)

    def compiled(self, compile: Callable[[int, Any, Sequence[Any]], Run]) -> Segments:
        """A copy with every segment compiled by ``compile(number, run, example inputs)``.

        The results of each are converted to the layout of its example outputs, for which the next ones are compiled;
        Inductor may choose another layout.
        """
        segments: list[Segment] = []

        def look(segment: Segment, taken: list, given: Sequence[Any]) -> None:
            segments.append(replace(segment, run=_laid_out(compile(len(segments), segment.run, taken), given)))

        self.on_examples(look)
        return replace(self, segments=tuple(segments))

    def _each(self, run: Callable[[Segment, list], Sequence[Any]], args: Sequence[Any]) -> tuple[Any, ...]:
        """Run the segments in order; a value is freed as soon as no later segment takes it."""
        values = self.known(args)
        run_each(self.segments, values, run)
        return tuple(values[out] if isinstance(out, fx.Node) else out for out in self.outputs)


def run_segment(segment: Segment, taken: list) -> Sequence[Any]:
    """Run one segment."""
    return segment.run(*taken)


def run_each(
    segments: Sequence[Segment], values: dict[Any, Any], run: Callable[[Segment, list], Sequence[Any]] = run_segment
) -> None:
    """Run segments in order: they take ``values`` and add to them. Values that no later segment takes are removed."""
    for segment in segments:
        taken = [values[key] for key in segment.takes]
        for key in segment.last:
            del values[key]
        values.update(zip(segment.gives, run(segment, taken), strict=True))


def _laid_out(run: Run, examples: Sequence[Any]) -> Run:
    """``run`` with results in the dim order of ``examples``, dense, for every example that is dense."""
    orders = [_dense_order(x) if isinstance(x, Tensor) else None for x in examples]

    def laid_out(*args: Any) -> list[Any]:
        return [x if order is None else _in_order(x, order) for x, order in zip(run(*args), orders, strict=True)]

    return laid_out


def _dense_order(x: Tensor) -> list[int] | None:
    """The dims of an example from the outermost in memory; ``None`` if it has gaps."""
    sizes, strides = ([*map(hint, numbers)] for numbers in (x.shape, x.stride()))
    order = order_in_memory(x)
    inside = [prod(sizes[dim] for dim in order[i + 1 :]) for i in range(x.ndim)]
    is_dense = all(strides[dim] == inner for dim, inner in zip(order, inside, strict=True) if sizes[dim] != 1)
    return order if is_dense else None


def _in_order(x: Tensor, order: list[int]) -> Tensor:
    return x if x.permute(order).is_contiguous() else copied_in_order(x, order)


@dataclass(frozen=True)
class CopyKV:
    """Copy keys and values that would keep a larger tensor alive.

    Reads and writes ``Rewrite``. Blocks of the ditch stream read values of the seek stream; keys and values that are
    views of one product with the queries would keep the queries of all tokens.
    """

    name: str = "kv copies"

    def run(self, program: Program) -> Program:
        rewrite = program[Rewrite].copied()
        _copy_views(rewrite.module.graph)
        rewrite.module.recompile()
        return program.with_(rewrite)

    def check(self, program: Program) -> None:
        """The graph is well-formed."""
        program[Rewrite].module.graph.lint()


@dataclass(frozen=True)
class Split:
    """Cut the rewritten graph at the block boundaries of the ditch stream.

    Reads ``Rewrite``; writes ``Segments``.
    """

    name: str = "split"

    def run(self, program: Program) -> Program:
        module, inputs = program[Rewrite].module, program[Rewrite].inputs
        returned: Any = module.graph.output_node().args[0]
        outputs = tuple(returned)
        sizes = places_of_symbols(inputs)
        segments, wanted = list[Segment](), set(outputs)
        blocks = _blocks(module.graph, program[Rounds].inputs)
        for nodes in reversed(blocks.values()):
            segments.insert(0, _segment(module, nodes, sizes, wanted))
            wanted |= {*segments[0].takes}
        placeholders = tuple(module.graph.find_nodes(op="placeholder"))
        phases = tuple(sum(number < first for number in blocks) for _, first in program[Rewrite].rounds)
        return program.with_(Segments(inputs, placeholders, sizes, tuple(segments), outputs, phases))

    def check(self, program: Program) -> None:
        """Every segment is well-formed and takes only values that exist when it runs."""
        there = {*program[Segments].placeholders, *program[Segments].sizes}
        for segment in program[Segments].segments:
            assert isinstance(segment.run, fx.GraphModule)
            segment.run.graph.lint()
            if not there >= {*segment.takes}:
                raise InvariantBroken("A segment of the rewritten graph takes a value that a later one gives.")
            there |= {*segment.gives}


def _blocks(graph: fx.Graph, of_rounds: int) -> dict[int, list[fx.Node]]:
    """The operations of every segment, by the number of its block.

    A node belongs to the block in which it was traced, or to that of its operands if that is later. The last
    ``of_rounds`` inputs belong to the first block of a round.
    """
    inputs = graph.find_nodes(op="placeholder")
    numbers: dict[fx.Node, int] = dict.fromkeys(inputs[len(inputs) - of_rounds :], 1)
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            own = 0 if node.target is operator.getitem else block_of(node.meta)
            numbers[node] = max([own, *(numbers.get(arg, 0) for arg in node.all_input_nodes)])
            found.setdefault(numbers[node], []).append(node)
    return {number: found[number] for number in sorted(found)}


def _copy_views(graph: fx.Graph) -> None:
    """Give blocks of the ditch stream copies of seek-stream values that would keep a larger tensor alive."""
    read: dict[Any, list[fx.Node]] = {}
    kept = {_storage(node) for node in (*graph.find_nodes(op="placeholder"), *graph.output_node().all_input_nodes)}
    for node in graph.nodes:
        if is_tensor(node) and not block_of(node.meta) and any(block_of(user.meta) for user in node.users):
            read.setdefault(_storage(node), []).append(node)
    for storage, nodes in read.items():
        if storage not in kept and sum(map(bytes_hint, nodes)) < hint(storage.nbytes()):
            for node in nodes:
                _copy_for_blocks(node)


def _storage(node: fx.Node) -> Any:
    return node.meta["val"].untyped_storage() if is_tensor(node) else None


def _copy_for_blocks(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        copy = emit(node, torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(copy, lambda user: bool(block_of(user.meta)))


def _segment(module: fx.GraphModule, nodes: list[fx.Node], sizes: dict, wanted: set) -> Segment:
    """``nodes`` as a graph of their own, which returns the values that are ``wanted`` after them."""
    nodes = [*_numbers_read(nodes), *nodes]
    read = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in {*nodes})
    takes = [node for node in read if node.op != "get_attr"]
    symbols = dict.fromkeys(
        s for node in takes for s in sorted(free_symbols(node.meta.get("val")), key=str) if s in sizes
    )
    gives = tuple(node for node in nodes if node in wanted)
    graph = fx.Graph()
    inputs = {key: graph.placeholder(f"input_{i}") for i, key in enumerate((*symbols, *takes))}
    copies = inputs | {node: graph.get_attr(node.target) for node in read if node.op == "get_attr"}
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs)
    for node in (*takes, *nodes):
        copies[node].meta = without_block(node.meta)
    graph.output(tuple(copies[node] for node in gives))
    return Segment(fx.GraphModule(module, graph), tuple(inputs), gives, frozenset(inputs) - wanted)


def _numbers_read(nodes: list[fx.Node]) -> list[fx.Node]:
    """The operations that compute floats which ``nodes`` read.

    A compiled graph can't return floats, so each segment computes them itself.
    """
    found: dict[fx.Node, None] = {}
    waiting = [arg for node in nodes for arg in node.all_input_nodes if arg not in {*nodes}]
    while waiting:
        node = waiting.pop()
        if isinstance(node.meta.get("val"), torch.SymFloat) and node.op == "call_function":
            found[node] = None
            waiting += node.all_input_nodes
    return [*reversed(found)]
