"""Show: print a program, one line per value of its latest graph, with the results of the passes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from .analysis.activity import Activity
from .analysis.blocks import Blocks
from .analysis.token_axes import TokenAxes
from .graph.factors import Dim
from .graph.kinds import Kind, block_of, kind_of
from .graph.nodes import is_tensor
from .graph.program import Program
from .lower.split import Segments
from .memory.saved import Audit
from .streams.trace import Rewrite

#: Arguments about device and memory layout, which are not printed.
_PLACEMENT = ("device", "layout", "memory_format", "pin_memory")


def show(program: Program) -> str:
    """Return ``program`` as text: its latest graph, or what the latest pass found.

    After ``trace`` it shows the rewritten graph, after ``split`` the inputs and outputs of the segments, after ``saved
    tensors`` the tensors that are saved for backward.

    A line is ``name: type[shape] = operation(arguments)  # remarks``. A leading ``*`` marks a value that carries
    gradient. In a shape, ``t:`` and ``b:`` mark the token axis and the batch; the factors of one dim are in
    parentheses. In the rewritten graph the remark is the stream that a value belongs to.

    >>> print(show(analysis().run(Program(gm, inputs))))  # doctest: +SKIP
    * embedding: f32[b:2, t:5, 8] = embedding(weight, ids)  # stream
    """
    if Audit in program.results:
        return "\n".join(_saved(program[Audit]))
    if Segments in program.results:
        return "\n".join(_segments(program[Segments]))
    if Rewrite in program.results:
        return "\n".join(_rewritten_line(node) for node in program[Rewrite].module.graph.nodes)
    return "\n".join(_line(program, node) for node in program.graph.nodes)


def show_blocks(program: Program) -> list[str]:
    """The rewritten graph by block: one text for all tokens and the choice, then one per block of kept rows.

    The first line of each text is a title; the other lines are as in ``show``. The remark ``barrier`` marks rows that
    are scattered into all tokens, and the operation that runs on the result.
    """
    parts: dict[int, list[fx.Node]] = {}
    for node in program[Rewrite].module.graph.nodes:
        if node.op != "output":
            parts.setdefault(block_of(node.meta), []).append(node)
    return ["\n".join([_title(number, nodes), *map(_block_line, nodes)]) for number, nodes in sorted(parts.items())]


def _title(number: int, nodes: Sequence[fx.Node]) -> str:
    counts = Counter(_operation(node.target) for node in nodes if node.op == "call_function")
    barriers = sum(map(_runs_in_full, nodes))
    what = f"kept rows, block {number}" if number else "all tokens, and the choice"
    return f"{what} (operations: {counts.total()}, gathers: {counts['gather']}, barriers: {barriers})"


def _block_line(node: fx.Node) -> str:
    if _runs_in_full(node):
        return _text("  ", node, _plain_type(node.meta.get("val")), "barrier, runs over all tokens")
    return _rewritten_line(node)


def _runs_in_full(node: fx.Node) -> bool:
    """True if rows were scattered into all tokens for this operation."""
    return _stream(node) != Kind.BARRIER and any(_stream(x) == Kind.BARRIER for x in node.all_input_nodes)


def _stream(node: fx.Node) -> str:
    return kind_of(node) or Kind.SEEK


def _line(program: Program, node: fx.Node) -> str:
    live = Activity in program.results and node in program[Activity].live
    return _text("* " if live else "  ", node, _type(program, node), ", ".join(_remarks(program, node)))


def _rewritten_line(node: fx.Node) -> str:
    """A line of the rewritten graph, which no pass has analysed: nodes carry the stream that they belong to."""
    return _text("  ", node, _plain_type(node.meta.get("val")), _stream(node) if node.op == "call_function" else "")


def _text(mark: str, node: fx.Node, kind: str, remark: str) -> str:
    if node.op == "output":
        return f"  return {_argument(node.args[0])}"
    made = f" = {_call(node)}" if node.op == "call_function" else ""
    return f"{mark}{node.name}: {kind}{made}" + (f"  # {remark}" if remark else "")


def _remarks(program: Program, node: fx.Node) -> Iterator[str]:
    if node.op == "placeholder":
        yield "input"
    if TokenAxes in program.results and any(node is attention.node for attention in program[TokenAxes].attentions):
        yield "attention"
    if Blocks in program.results and node in program[Blocks].stream:
        yield "stream"
    if Blocks in program.results and node in [
        program[Blocks].last_entry(program[TokenAxes], axis) for axis in program[TokenAxes].tokens
    ]:
        yield "the last block begins"
    if Activity in program.results and node in program[Activity].losses:
        yield "loss"


def _type(program: Program, node: fx.Node) -> str:
    if TokenAxes not in program.results or not is_tensor(node):
        return _plain_type(node.meta.get("val"))
    labels, shape = program[TokenAxes].of(node), node.meta["val"].shape
    dims = [_dim(program, label, size) for label, size in zip(labels, shape, strict=True)]
    return f"{_dtype(node.meta['val'].dtype)}[{', '.join(dims)}]"


def _dim(program: Program, label: Dim, size: Any) -> str:
    """``5``, ``t:5`` or ``(b:2 t:5)``."""
    factors: list[str] = []
    while label:
        name, axis = next(
            ((name, axis) for name, axis in _named(program) if axis and label[: len(axis)] == axis), ("", label[:1])
        )
        factors.append(f"{name}{program[TokenAxes].space.size(axis)}")
        label = label[len(axis) :]
    named = any(":" in factor for factor in factors)
    return str(size) if not named else factors[0] if len(factors) == 1 else f"({' '.join(factors)})"


def _named(program: Program) -> list[tuple[str, Dim]]:
    numbered = [(axis, str(i) if i > 1 else "") for i, axis in enumerate(program[TokenAxes].tokens, 1)]
    tokens = [(f"t{number}:", axis.token) for axis, number in numbered]
    return [*((f"b{number}:", axis.batch) for axis, number in numbered), *tokens]


def _plain_type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_plain_type, value))})"
    return type(value).__name__


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")


def _call(node: fx.Node) -> str:
    keywords = [f"{name}={_argument(value)}" for name, value in node.kwargs.items() if name not in _PLACEMENT]
    return f"{_operation(node.target)}({', '.join([*map(_argument, node.args), *keywords])})"


def _operation(target: Any) -> str:
    """``aten.pow.Tensor_Scalar`` -> ``pow``; operations of other libraries keep their namespace."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::").replace("::", ".")
    return getattr(target, "__name__", str(target))


def _argument(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(_argument, value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return "end" if value == sys.maxsize and not isinstance(value, fx.Node) else str(value)


def _segments(segments: Segments) -> Iterator[str]:
    """For every segment: the number of its operations, its inputs and its outputs."""
    for number, segment in enumerate(segments.segments):
        count = len(segment.run.graph.nodes) - len(segment.takes) - 1
        yield f"  segment {number}: {count} operations"
        for word, values in (("takes", segment.takes), ("gives", segment.gives)):
            yield f"    {word} {', '.join(map(_value, values))}"


def _value(x: Any) -> str:
    return f"{x}: {_plain_type(x.meta.get('val'))}" if isinstance(x, fx.Node) else str(x)


def _saved(audit: Audit) -> Iterator[str]:
    """One line per tensor saved for backward, sorted by kind, then by decreasing size."""
    yield f"{audit.bytes:>6} bytes saved for backward"
    for edge in sorted(audit.edges, key=lambda edge: (edge.kind, -edge.bytes, edge.shape)):
        yield f"{edge.bytes:>6} {edge.kind:<12} {_dtype(edge.dtype)}[{', '.join(map(str, edge.shape))}]"
