"""Token loss: run and differentiate the scoring tail, for the loss and the gradient of every token.

The gradient is that of the full loss with all parameters frozen; TokenSeek's I2 is its absolute sum. The part after the
last operation that mixes tokens, including the head, is run and differentiated for one chunk of tokens at a time, with
the row rules of the ditch stream, so no ``[B, T, V]`` tensor exists. The part before it (the attention) is
differentiated as a whole.

Both parts are traced below autograd, so that the operations of their backward are recorded, and called in the seek
stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..analysis.row_index import RowIndex, example_sizes
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..attention.positional import PositionalAttentions, laid_out_as, read_by
from ..capture.retrace import is_autocast
from ..graph.errors import GraphNotSupported
from ..graph.factors import same_size
from ..graph.fake import fake_mode_of
from ..graph.kinds import Kind, tag
from ..graph.nodes import bind_values, operands_of
from ..graph.op_sets import MEAN
from ..graph.program import Program
from ..rows.losses import divisor, positions_of, token_losses
from ..rows.row_op import RowOp
from .ditch_stream import DitchStream
from .scoring_tail import Tail
from .subgraph import RowSubgraph, trace_whole


class TokenSignals(NamedTuple):
    """Loss and gradient of every token.

    Args:
        loss: [B, T], 0 for tokens without a label.
        total: the value of the model's loss operation over all tokens (0-dim).
        gradients: for each token axis |dL/dz| summed over the hidden dim, [B, T].
    """

    loss: Tensor | None
    total: Tensor | None
    gradients: dict[TokenAxis, Tensor]


class Traced(NamedTuple):
    """The two traced parts of a tail.

    Args:
        tail: the tail.
        chunks: the sizes of the chunks of tokens, each with its graph (indices, *frontier rows, *captured) -> (loss
            rows, *gradients).
        captured: the other values that the chunks read.
        back: (*starts, *gradients of the frontier, their scale, total, *captured) -> (*gradients of the starts,).
        captured_back: the other values that ``back`` reads.
    """

    tail: Tail
    chunks: list[tuple[Any, fx.GraphModule]]
    captured: tuple[fx.Node, ...]
    back: fx.GraphModule | None
    captured_back: tuple[fx.Node, ...]


def trace_tail(tail: Tail, gradient: bool, chunk_bytes: int) -> Traced:
    """Trace the two parts of ``tail``.

    The chunked part includes gradients if ``gradient``; then the backward of the rest is traced too.
    """
    captured = _captured(tail.program, tail.chunked, tail.frontier) if tail.loss is not None else ()
    chunks = _trace_chunks(tail, chunk_bytes, gradient, captured) if tail.loss is not None else []
    captured_back = _captured(tail.program, tail.rest, (*tail.starts, tail.loss, *tail.frontier))
    back = _trace_back(tail, captured_back) if gradient else None
    return Traced(tail, chunks, captured, back, captured_back)


def run_tail(traced: Traced, values: Mapping[fx.Node, Any], row_indices: Mapping[TokenAxis, RowIndex]) -> TokenSignals:
    """Loss and gradient of every token, from the seek stream's ``values``.

    ``row_indices`` have the sizes of the token axes.
    """
    tail, axes = traced.tail, traced.tail.program[TokenAxes]
    row_index = row_indices[axes.main]
    loss = total = None
    unit: list[Tensor] = []
    scale = torch.ones((), device=row_index.indices.device)
    if tail.loss is not None:
        loss, unit = _run_chunks(traced, values, row_index)
        wide = torch.promote_types(loss.dtype, torch.float32)
        given = bind_values(tail.loss, values)
        count = divisor(given["target"], given["ignore_index"], given["weight"]) if given["reduction"] == MEAN else 1
        total = (loss.sum(dtype=wide) / count).to(tail.loss.meta["val"].dtype)
        scale = scale.to(wide) / count
    if traced.back is None:
        return TokenSignals(loss, total, {})
    extra = () if total is None else (scale, total)
    captured = [values[node] for node in traced.captured_back]
    starts = [values[node] for node in tail.starts]
    found = fx.Interpreter(traced.back).run(*starts, *unit, *extra, *captured)
    gradients = {}
    for node, gradient in zip(tail.starts, found, strict=True):
        axis = axes.axis_of(node)
        size = gradient.abs().to(torch.promote_types(gradient.dtype, torch.float32))
        gradients[axis] = row_indices[axis].by_token(size, axes.of(node), axes.row_dim(node))
    return TokenSignals(loss, total, gradients)


def _run_chunks(traced: Traced, values: Mapping[fx.Node, Any], row_index: RowIndex) -> tuple[Tensor, list[Tensor]]:
    """Losses of tokens [B, T], and for every value of the frontier the gradient of their sum."""
    axes, frontier = row_index.axes, traced.tail.frontier
    captured = [values[node] for node in traced.captured]
    losses, gradients, start = [], [], 0
    whole = len(traced.chunks) == 1
    for size, chunk in traced.chunks:
        positions = torch.arange(start, start + size, device=row_index.indices.device)
        part = replace(row_index, indices=positions.expand(row_index.batch, size))
        rows = [values[n] if whole else part.take(values[n], axes.of(n), axes.row_dim(n)) for n in frontier]
        loss, *of_rows = fx.Interpreter(chunk).run(part.indices, *rows, *captured)
        losses.append(loss)
        gradients.append(of_rows)
        start = start + size
    joined = [
        row_index.join(parts, axes.of(node), axes.row_dim(node), values[node].shape)
        for node, parts in zip(frontier, zip(*gradients, strict=True), strict=False)
    ]
    return torch.cat(losses, -1), joined


def _trace_chunks(
    tail: Tail, chunk_bytes: int, gradient: bool, captured: Sequence[fx.Node]
) -> list[tuple[Any, fx.GraphModule]]:
    """The size and graph of every chunk; all except the last are equal."""
    sizes = tail.chunks(chunk_bytes)
    last = _trace_chunk(tail, sizes[-1], gradient, captured)
    same = same_size(sizes[0], sizes[-1])
    others = last if same else _trace_chunk(tail, sizes[0], gradient, captured)
    return [(size, others) for size in sizes[:-1]] + [(sizes[-1], last)]


def _captured(program: Program, nodes: Sequence[fx.Node], known: Sequence[fx.Node | None]) -> tuple[fx.Node, ...]:
    """The values that ``nodes`` read, without ``nodes``, ``known`` and bodies of higher-order operators."""
    inside = {*nodes, *known}
    read = dict.fromkeys(arg for node in nodes for arg in read_by(program, node) if arg not in inside)
    return tuple(node for node in read if "val" in node.meta)


def _trace_chunk(tail: Tail, size: Any, gradient: bool, captured: Sequence[fx.Node]) -> fx.GraphModule:
    program = tail.program
    axes, (batch, tokens) = program[TokenAxes], example_sizes(program, program[TokenAxes].main)

    def chunk(indices: Tensor, *args: Any) -> tuple[Tensor, ...]:
        rows, known = args[: len(tail.frontier)], _frozen(captured, args[len(tail.frontier) :])
        leaves = [row.detach().requires_grad_(gradient) for row in rows]
        row_index = RowIndex(axes, axes.main, indices, batch, tokens)
        streams = _Chunk(program, tail.rows, known, row_index, dict(zip(tail.frontier, leaves, strict=True)))
        with torch.set_grad_enabled(gradient):
            streams.run()
            losses, end, given = _losses(tail, streams, gradient)
        target = operands_of(tail.loss)[1]
        dim, _, labels = positions_of(
            target.meta["val"], axes.row_dim(target), target.meta["val"].shape, axes.of(target)
        )
        by_token = row_index.by_token(losses.detach(), labels, dim, indices.shape[1])
        return (by_token, *(_gradients([end], leaves, [given]) if gradient else ()))

    with fake_mode_of(program.inputs):
        indices = torch.zeros(batch, size, dtype=torch.int64, device=tail.starts[0].meta["val"].device)
        row_index = RowIndex(axes, axes.main, indices, batch, tokens)
        shapes = [row_index.row_shape(node.meta["val"].shape, axes.row_dim(node)) for node in tail.frontier]
        rows = [node.meta["val"].new_empty(shape) for node, shape in zip(tail.frontier, shapes, strict=True)]
    return _traced(chunk, [indices, *rows, *(node.meta["val"] for node in captured)], tail)


def _losses(tail: Tail, streams: DitchStream, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the rows, a value that they depend on (or their sum), and the gradient of their sum there."""
    if tail.head is not None:
        return tail.head.run(streams, gradient)
    losses = token_losses(RowOp(tail.loss, streams, None))
    return losses, losses.sum(), losses.new_ones(())


def _trace_back(tail: Tail, captured: Sequence[fx.Node]) -> fx.GraphModule:
    """The gradients of the starts: autograd of the rest of the tail, from the gradients of the chunked part."""
    program, end = tail.program, tail.end
    chunked = tail.loss is not None

    def back(*given: Any) -> tuple[Tensor, ...]:
        starts, given = given[: len(tail.starts)], given[len(tail.starts) :]
        unit, args = given[: len(tail.frontier)], given[len(tail.frontier) :]
        leaves = [start.detach().requires_grad_() for start in starts]
        known: dict[fx.Node, Any] = dict(zip(tail.starts, leaves, strict=True))
        if chunked:
            scale, total, args = args[0], args[1], args[2:]
            known[tail.loss] = total.detach().requires_grad_()
        known.update(_frozen(captured, args))
        with torch.enable_grad():
            _run(program, tail.rest, known)
            outputs, gradients = [known[end]], [torch.ones_like(known[end])]
            if chunked:
                (upstream,) = _gradients([known[end]], [known[tail.loss]])
                outputs += [known[node] for node in tail.frontier]
                gradients += [(g * (upstream * scale)).to(g.dtype) for g in unit]
            return tuple(_gradients(outputs, leaves, gradients))

    unit = [node.meta["val"] for node in tail.frontier]
    with fake_mode_of(program.inputs):
        scalars = [torch.ones((), device=tail.starts[0].meta["val"].device), tail.loss.meta["val"]] if chunked else []
    starts = [node.meta["val"] for node in tail.starts]
    inputs = [*starts, *unit, *scalars, *(node.meta["val"] for node in captured)]
    return _traced(back, inputs, tail)


def _gradients(outputs: list[Tensor], inputs: list[Tensor], given: list[Tensor] | None = None) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros for unused inputs.

    Outputs without gradient are ignored, and the graph is retained.
    """
    given = given or [torch.ones_like(out) for out in outputs]
    live = [(out, g) for out, g in zip(outputs, given, strict=True) if out.requires_grad]
    outs, gs = [out for out, _ in live], [g for _, g in live]
    found = (
        torch.autograd.grad(outs, inputs, gs, retain_graph=True, allow_unused=True) if outs else [None] * len(inputs)
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _run(program: Program, nodes: Sequence[fx.Node], known: dict[fx.Node, Any]) -> None:
    """Run ``nodes`` and add their values to ``known``; autocast switches on the way are executed."""
    interpreter = fx.Interpreter(program.module)
    interpreter.env, wanted = known, set(nodes)
    for node in program.graph.nodes:
        if node in wanted and node in program[PositionalAttentions]:
            known[node] = laid_out_as(node.meta["val"], program[PositionalAttentions][node].of_all_tokens(known))
        elif is_autocast(node) or node in wanted or (node.op == "get_attr" and "val" not in node.meta):
            known[node] = interpreter.run_node(node)


def _frozen(nodes: Sequence[fx.Node], values: Sequence[Any]) -> dict[fx.Node, Any]:
    return {n: x.detach() if isinstance(x, Tensor) else x for n, x in zip(nodes, values, strict=True)}


def _traced(function: Callable[..., Any], inputs: Sequence[Any], tail: Tail) -> fx.GraphModule:
    module = trace_whole(function, inputs)
    for node in module.graph.nodes:
        node.meta = {**tail.starts[0].meta, **node.meta, "custom": {}}
        tag(node, Kind.SCORING)
    return module


class _Chunk(RowSubgraph):
    """The chunked part of a tail: its ditch stream, started from the frontier, without values of all tokens."""

    def full(self, node: fx.Node) -> Any:
        if node in self.live:
            raise GraphNotSupported(
                "An operation after the last attention reads other tokens, so no token has its own loss or gradient.",
                'Choose scorer="attention" or scorer="random".',
                node,
            )
        return self.seek[node]
