"""Tail: from the input of the last block (or of the head) to the loss, and back: loss and gradient of every token.

The gradient is that of the full loss with all parameters frozen (TokenSeek's I2 is its absolute sum). What follows the last
place where tokens mix, the head above all, is run and differentiated for a chunk of tokens at a time, with the rows rules of
the ditch stream: no ``[B, T, V]`` tensor exists. What comes before (the attention) is differentiated as a whole.

Both parts are traced without pre-dispatch, where autograd's operations are recorded, and placed in the seek stream.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .attend import laid_out_as, read_by
from .call import Call
from .canonicalize import is_autocast
from .errors import GraphNotSupported
from .factors import same_size
from .fake import fake_mode_of
from .geometry import Geometry, example_sizes
from .head import Head, find_head
from .part import Part, trace_whole
from .program import Program
from .routes import Route
from .rules.op import bind, bind_values, bytes_hint, hint, is_tensor, operands_of
from .rules.rows import LABEL_LOSSES, MEAN, SUM, divisor, token_losses
from .streams import Streams, class_factors, label_losses
from .token_axes import TokenAxis

_MOST_CHUNKS = 64


class TokenSignals(NamedTuple):
    """``loss``: of every token, [B, T], 0 without a label. ``total``: the model's loss operation of all tokens (0-dim).
    ``gradients``: by token axis |dL/dz| summed over the hidden dim, [B, T]."""

    loss: Tensor | None
    total: Tensor | None
    gradients: dict[TokenAxis, Tensor]


@dataclass(frozen=True)
class Tail:
    """The operations between ``starts`` (one for each token axis that is scored, first that of the loss) and ``end``, the
    scalar that is differentiated.

    ``loss``: the label loss that is computed in chunks (``None``: there is no single one, all is done as a whole).
    ``head``: what leads to it, where that is a linear head. ``rows``: the other operations before it that work on every token
    alone. ``frontier``: what they start from. ``rest``: all others.
    """

    program: Program
    starts: tuple[fx.Node, ...]
    end: fx.Node
    loss: fx.Node | None
    head: Head | None
    rows: tuple[fx.Node, ...]
    frontier: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]

    @property
    def chunked(self) -> tuple[Any, ...]:
        """The label loss and what leads to it from the frontier."""
        return (*self.rows, *(() if self.head is None else self.head.nodes), self.loss)

    @property
    def after_loss(self) -> list[fx.Node]:
        """What is computed from the label loss, in order."""
        return _reached(self.rest, {self.loss})

    def chunks(self, chunk_bytes: int) -> list[Any]:
        """The sizes into which the tokens are cut, so that the largest value of a chunk takes ``chunk_bytes`` (more where that
        were over 64 chunks); a head alone is not cut."""
        _, tokens = example_sizes(self.program, self.program.axes.main)
        if self.head is not None and not self.rows:
            return [tokens]
        largest = max(bytes_hint(node) for node in (*self.rows, *self.frontier) if is_tensor(node))
        return cut_to(tokens, largest, chunk_bytes)


def cut_to(tokens: Any, largest: int, chunk_bytes: int) -> list[Any]:
    """Sizes of chunks in which a value that takes ``largest`` bytes for all tokens takes ``chunk_bytes``, at most 64 of them."""
    return cut(tokens, min(_MOST_CHUNKS, -(-largest // chunk_bytes), hint(tokens)))


def cut(tokens: Any, count: int) -> list[Any]:
    """At most ``count`` sizes that add up to ``tokens``, all but the last alike; a symbolic length is cut so that none is
    negative at any length.

    >>> cut(100, 64)[-2:], len(cut(100, 64)), cut(13, 5)
    ([2, 2], 50, [3, 3, 3, 3, 1])
    """
    if not isinstance(tokens, int):
        return [tokens // count] * (count - 1) + [tokens - (count - 1) * (tokens // count)]
    size = -(-tokens // count)
    return [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)


def find_tail(program: Program, starts: Sequence[fx.Node]) -> Tail:
    """What lies between the starts and the loss; a start that only leads to the loss through another one is left out."""
    end = scored_loss(program)
    nodes = _between(program, starts, end)
    starts = tuple(start for start in starts if any(user in {*nodes} for user in start.users))
    losses = [node for node in nodes if _has_token_losses(program, node)]
    loss = losses[0] if len(losses) == 1 else None
    rows = _token_parallel(program, nodes, loss) if loss is not None else []
    if loss is not None and operands_of(loss)[0] not in {*rows, *starts}:
        loss, rows = None, []
    ends = [*rows, loss] if loss is not None else []
    inside = {*starts, *nodes} - {*ends}
    frontier = dict.fromkeys(arg for node in ends for arg in node.all_input_nodes if arg in inside)
    rest = tuple(node for node in nodes if node not in {*ends})
    head = find_head(loss, {*rows}, {*starts, *nodes}) if loss is not None else None
    rows = tuple(node for node in rows if head is None or node not in head.nodes)
    return Tail(program, starts, end, loss, head, rows, tuple(frontier), rest)


def scored_loss(program: Program) -> fx.Node:
    """Of several scalar outputs the first that a label loss is part of (the others are parts or statistics of it)."""
    parts = {node for node in program.graph.nodes if node.target in LABEL_LOSSES}
    found = parts.union(_reached(program.graph.nodes, parts))
    losses = program.activity.losses
    return next((loss for loss in losses if loss in found), losses[0])


def has_token_loss(program: Program) -> bool:
    """True where exactly one live loss is a mean or sum over labelled tokens (of the first token axis)."""
    return sum(_has_token_losses(program, node) for node in label_losses(program)) == 1


def head_input(program: Program) -> fx.Node | None:
    """The input of the head: the last value with rows, on every path to the loss, that has no class dim yet."""
    classes = class_factors(program)
    stream = [
        node for node in program.blocks.streams[program.axes.main] if not classes & set(sum(program.axes.of(node), ()))
    ]
    return stream[-1] if stream else None


def _between(program: Program, starts: Sequence[fx.Node], end: fx.Node) -> list[fx.Node]:
    """Live nodes on the paths from ``starts`` (without them and what they are computed from) to ``end``, in order."""
    below = _reached([node for node in program.graph.nodes if node in program.activity.live], {*starts})
    above, before = {end}, {*starts}
    for node in reversed(program.graph.nodes):
        if any(user in before for user in node.users):
            before.add(node)
    for node in reversed(below):
        if any(user in above for user in node.users):
            above.add(node)
    return [node for node in below if node in above and node not in before]


def _reached(nodes: Iterable[fx.Node], sources: set[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` (in order) that are computed from ``sources``, without these."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        if node not in sources and any(arg in sources or arg in found for arg in node.all_input_nodes):
            found[node] = None
    return list(found)


def _has_token_losses(program: Program, node: fx.Node) -> bool:
    """A reduced label loss whose operands have one row for every token."""
    if node.target not in LABEL_LOSSES:
        return False
    given, axes = bind(node), program.axes
    logits, target = given["self"], given["target"]
    classes = min(1, logits.meta["val"].ndim - 1)
    return (
        given["reduction"] in (MEAN, SUM)
        and not target.meta["val"].is_floating_point()
        and axes.has_rows_of(axes.main, logits)
        and axes.has_rows_of(axes.main, target)
        and axes.row_dim(logits) != classes
    )


def _token_parallel(
    program: Program, nodes: list[fx.Node], loss: fx.Node, without: frozenset[Route] = frozenset()
) -> list[fx.Node]:
    """The operations that lead to the loss alone and work on every token alone, in order. A route is there as a whole, with what it sorts
    by, or not at all: those of ``without`` are not."""
    found, inside = {loss}, {*nodes}
    routes = {node: route for route in program.axes.routes if route.exits & inside for node in route.nodes}
    for node in reversed(nodes):
        users, route = [user for user in node.users if user in inside], routes.get(node)
        if node is loss or not all(user in found for user in users):
            continue
        if _is_token_parallel(program, node, inside) if route is None else route not in without:
            found.add(node)
    for node in nodes:  # a part of a tuple stays with the tuple
        if node.target is operator.getitem and node.args[0] not in found:
            found.discard(node)
    if broken := {route for node, route in routes.items() if node in inside and node not in found} - without:
        return _token_parallel(program, nodes, loss, without | broken)
    found |= {node for node, route in routes.items() if route not in without}
    return [node for node in program.graph.nodes if node in found and node is not loss]


def _is_token_parallel(program: Program, node: fx.Node, inside: set[fx.Node]) -> bool:
    axes = program.axes
    if not axes.has_rows_of(axes.main, node) or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    dim = axes.row_dim(node)
    carried = [axes.carried(node, i, dim) for i, arg in enumerate(operands_of(node)) if arg in inside]
    return all(place is not None for place in carried)


class Traced(NamedTuple):
    """The two traced parts of a tail. ``chunks``: the sizes into which tokens are cut, each with its graph
    (indices, *frontier rows, *captured) -> (loss rows, *gradients).
    ``back``: (*starts, *gradients of the frontier, scale of them, total, *captured) -> (*gradients of the starts,)."""

    tail: Tail
    chunks: list[tuple[Any, fx.GraphModule]]
    captured: tuple[fx.Node, ...]
    back: fx.GraphModule | None
    captured_back: tuple[fx.Node, ...]


def trace_tail(tail: Tail, gradient: bool, chunk_bytes: int) -> Traced:
    """Trace the parts of ``tail``: the chunked one without gradients unless ``gradient``, and then the way back."""
    captured = _captured(tail.program, tail.chunked, tail.frontier) if tail.loss is not None else ()
    chunks = _trace_chunks(tail, chunk_bytes, gradient, captured) if tail.loss is not None else []
    captured_back = _captured(tail.program, tail.rest, (*tail.starts, tail.loss, *tail.frontier))
    back = _trace_back(tail, captured_back) if gradient else None
    return Traced(tail, chunks, captured, back, captured_back)


def run_tail(traced: Traced, values: Mapping[fx.Node, Any], geometries: Mapping[TokenAxis, Geometry]) -> TokenSignals:
    """Loss and gradient of every token from the seek stream's ``values``; ``geometries`` have the sizes of the token axes."""
    tail, axes = traced.tail, traced.tail.program.axes
    geometry = geometries[axes.main]
    loss = total = None
    unit: list[Tensor] = []
    scale = torch.ones((), device=geometry.indices.device)
    if tail.loss is not None:
        loss, unit = _run_chunks(traced, values, geometry)
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
        gradients[axis] = geometries[axis].by_token(size, axes.of(node), axes.row_dim(node))
    return TokenSignals(loss, total, gradients)


def _run_chunks(traced: Traced, values: Mapping[fx.Node, Any], geometry: Geometry) -> tuple[Tensor, list[Tensor]]:
    """Per-token losses [B, T], and for every value of the frontier the gradient of their sum."""
    axes, frontier = geometry.axes, traced.tail.frontier
    captured = [values[node] for node in traced.captured]
    losses, gradients, start = [], [], 0
    whole = len(traced.chunks) == 1
    for size, chunk in traced.chunks:
        positions = torch.arange(start, start + size, device=geometry.indices.device)
        part = replace(geometry, indices=positions.expand(geometry.batch, size))
        rows = [values[n] if whole else part.take(values[n], axes.of(n), axes.row_dim(n)) for n in frontier]
        loss, *of_rows = fx.Interpreter(chunk).run(part.indices, *rows, *captured)
        losses.append(loss)
        gradients.append(of_rows)
        start = start + size
    joined = [
        geometry.join(parts, axes.of(node), axes.row_dim(node), values[node].shape)
        for node, parts in zip(frontier, zip(*gradients, strict=True), strict=False)
    ]
    return torch.cat(losses, -1), joined


def _trace_chunks(
    tail: Tail, chunk_bytes: int, gradient: bool, captured: Sequence[fx.Node]
) -> list[tuple[Any, fx.GraphModule]]:
    """Every chunk's size and graph; all but the last are alike."""
    sizes = tail.chunks(chunk_bytes)
    last = _trace_chunk(tail, sizes[-1], gradient, captured)
    same = same_size(sizes[0], sizes[-1])
    others = last if same else _trace_chunk(tail, sizes[0], gradient, captured)
    return [(size, others) for size in sizes[:-1]] + [(sizes[-1], last)]


def _captured(program: Program, nodes: Sequence[fx.Node], known: Sequence[fx.Node | None]) -> tuple[fx.Node, ...]:
    """What ``nodes`` read that is neither one of them nor ``known``, nor a body of a higher-order operator."""
    inside = {*nodes, *known}
    read = dict.fromkeys(arg for node in nodes for arg in read_by(program, node) if arg not in inside)
    return tuple(node for node in read if "val" in node.meta)


def _trace_chunk(tail: Tail, size: Any, gradient: bool, captured: Sequence[fx.Node]) -> fx.GraphModule:
    program = tail.program
    axes, (batch, tokens) = program.axes, example_sizes(program, program.axes.main)

    def chunk(indices: Tensor, *args: Any) -> tuple[Tensor, ...]:
        rows, known = args[: len(tail.frontier)], _frozen(captured, args[len(tail.frontier) :])
        leaves = [row.detach().requires_grad_(gradient) for row in rows]
        geometry = Geometry(axes, axes.main, indices, batch, tokens)
        streams = _Chunk(program, tail.rows, known, geometry, dict(zip(tail.frontier, leaves, strict=True)))
        with torch.set_grad_enabled(gradient):
            streams.run()
            losses, end, given = _losses(tail, streams, gradient)
        target = operands_of(tail.loss)[1]
        by_token = geometry.by_token(losses.detach(), axes.of(target), axes.row_dim(target), indices.shape[1])
        return (by_token, *(_gradients([end], leaves, [given]) if gradient else ()))

    with fake_mode_of(program.inputs):
        indices = torch.zeros(batch, size, dtype=torch.int64, device=tail.starts[0].meta["val"].device)
        geometry = Geometry(axes, axes.main, indices, batch, tokens)
        shapes = [geometry.row_shape(node.meta["val"].shape, axes.row_dim(node)) for node in tail.frontier]
        rows = [node.meta["val"].new_empty(shape) for node, shape in zip(tail.frontier, shapes, strict=True)]
    return _traced(chunk, [indices, *rows, *(node.meta["val"] for node in captured)], tail)


def _losses(tail: Tail, streams: Streams, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the rows, a value that they are computed from (or their sum itself), and the gradient of their sum there."""
    if tail.head is not None:
        return tail.head.run(streams, gradient)
    losses = token_losses(Call(tail.loss, streams, None))
    return losses, losses.sum(), losses.new_ones(())


def _trace_back(tail: Tail, captured: Sequence[fx.Node]) -> fx.GraphModule:
    """The gradients of the starts: autograd of the rest of the tail, given the gradients of the chunked part."""
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
    """``torch.autograd.grad`` where some outputs or inputs may have no part in it; the graph is kept."""
    given = given or [torch.ones_like(out) for out in outputs]
    live = [(out, g) for out, g in zip(outputs, given, strict=True) if out.requires_grad]
    outs, gs = [out for out, _ in live], [g for _, g in live]
    found = (
        torch.autograd.grad(outs, inputs, gs, retain_graph=True, allow_unused=True) if outs else [None] * len(inputs)
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _run(program: Program, nodes: Sequence[fx.Node], known: dict[fx.Node, Any]) -> None:
    """Run ``nodes``, adding to ``known``; autocast is switched for real on the way."""
    interpreter = fx.Interpreter(program.module)
    interpreter.env, wanted = known, set(nodes)
    for node in program.graph.nodes:
        if node in wanted and node in program.attending:
            known[node] = laid_out_as(node.meta["val"], program.attending[node].of_all_tokens(known))
        elif is_autocast(node) or node in wanted or (node.op == "get_attr" and "val" not in node.meta):
            known[node] = interpreter.run_node(node)


def _frozen(nodes: Sequence[fx.Node], values: Sequence[Any]) -> dict[fx.Node, Any]:
    return {n: x.detach() if isinstance(x, Tensor) else x for n, x in zip(nodes, values, strict=True)}


def _traced(function: Callable[..., Any], inputs: Sequence[Any], tail: Tail) -> fx.GraphModule:
    module = trace_whole(function, inputs)
    for node in module.graph.nodes:
        node.meta = {**tail.starts[0].meta, **node.meta, "custom": {"tokenseek": "scoring"}}
    return module


class _Chunk(Part):
    """The chunked part of a tail: its rows stream, started from the frontier; nothing of it exists for all tokens."""

    def full(self, node: fx.Node) -> Any:
        if node in self.live:
            raise GraphNotSupported(
                "An operation after the last attention looks at other tokens, so no token has a loss or a gradient of its own.",
                'Choose scorer="attention" or scorer="random".',
                node,
            )
        return self.seek[node]
