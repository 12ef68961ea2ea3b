"""Scoring tail: the operations from the input of the last block (or of the head) to the loss.

After the last operation that mixes tokens, the tail processes each token independently. This part, which includes the
head, is computed in chunks of tokens (``token_loss.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.activity import Activity
from ..analysis.blocks import Blocks
from ..analysis.losses import class_factors, label_losses
from ..analysis.routing import Route, Routes
from ..analysis.row_index import example_sizes
from ..analysis.token_axes import TokenAxes
from ..graph.nodes import bind, bytes_hint, hint, is_tensor, operands_of
from ..graph.op_sets import LABEL_LOSSES, MEAN, SUM
from ..graph.program import Program
from .linear_head import Head, find_head

_MOST_CHUNKS = 64


@dataclass(frozen=True)
class Tail:
    """The operations between ``starts`` and ``end``.

    Args:
        program: the program, with all parameters treated as trained.
        starts: one value for each token axis that is scored, that of the loss first.
        end: the scalar that is differentiated.
        loss: the label loss that is computed in chunks; ``None``: there is not exactly one, and the tail is computed as
            a whole.
        head: the linear head before the loss, if there is one.
        rows: the other operations before the loss that process each token independently.
        frontier: the values that ``rows`` and ``head`` start from.
        rest: all other operations.
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
        """The operations from the frontier to the label loss."""
        return (*self.rows, *(() if self.head is None else self.head.nodes), self.loss)

    @property
    def after_loss(self) -> list[fx.Node]:
        """The operations that depend on the label loss, in order."""
        return _reached(self.rest, {self.loss})

    def chunks(self, chunk_bytes: int) -> list[Any]:
        """The sizes of the chunks of tokens, at most 64.

        The largest value of a chunk takes ``chunk_bytes`` if 64 chunks suffice. A head alone is not cut.
        """
        _, tokens = example_sizes(self.program, self.program[TokenAxes].main)
        if self.head is not None and not self.rows:
            return [tokens]
        largest = max(bytes_hint(node) for node in (*self.rows, *self.frontier) if is_tensor(node))
        return cut_to(tokens, largest, chunk_bytes)


def cut_to(tokens: Any, largest: int, chunk_bytes: int) -> list[Any]:
    """Sizes of at most 64 chunks of tokens.

    A value that takes ``largest`` bytes for all tokens takes ``chunk_bytes`` per chunk, if 64 chunks suffice.
    """
    return cut(tokens, min(_MOST_CHUNKS, -(-largest // chunk_bytes), hint(tokens)))


def cut(tokens: Any, count: int) -> list[Any]:
    """At most ``count`` sizes that add up to ``tokens``, equal except the last one.

    A symbolic length is cut so that no size is negative at any length.

    >>> cut(100, 64)[-2:], len(cut(100, 64)), cut(13, 5)
    ([2, 2], 50, [3, 3, 3, 3, 1])
    """
    if not isinstance(tokens, int):
        return [tokens // count] * (count - 1) + [tokens - (count - 1) * (tokens // count)]
    size = -(-tokens // count)
    return [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)


def find_tail(program: Program, starts: Sequence[fx.Node]) -> Tail:
    """The operations between ``starts`` and the loss.

    A start that reaches the loss only through another start is left out.
    """
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
    """The first scalar output that depends on a label loss, else the first one.

    A model may return terms or statistics of its loss beside it.
    """
    parts = {node for node in program.graph.nodes if node.target in LABEL_LOSSES}
    found = parts.union(_reached(program.graph.nodes, parts))
    losses = program[Activity].losses
    return next((loss for loss in losses if loss in found), losses[0])


def has_token_loss(program: Program) -> bool:
    """True if exactly one live loss is a mean or sum over labelled tokens of the first token axis."""
    return sum(_has_token_losses(program, node) for node in label_losses(program)) == 1


def head_input(program: Program) -> fx.Node | None:
    """The input of the head: the last value of the residual stream that has no class dim."""
    classes = class_factors(program)
    stream = [
        node
        for node in program[Blocks].streams[program[TokenAxes].main]
        if not classes & set(sum(program[TokenAxes].of(node), ()))
    ]
    return stream[-1] if stream else None


def _between(program: Program, starts: Sequence[fx.Node], end: fx.Node) -> list[fx.Node]:
    """The live nodes on paths from ``starts`` to ``end``, in order, without ``starts`` and their ancestors."""
    below = _reached([node for node in program.graph.nodes if node in program[Activity].live], {*starts})
    above, before = {end}, {*starts}
    for node in reversed(program.graph.nodes):
        if any(user in before for user in node.users):
            before.add(node)
    for node in reversed(below):
        if any(user in above for user in node.users):
            above.add(node)
    return [node for node in below if node in above and node not in before]


def _reached(nodes: Iterable[fx.Node], sources: set[fx.Node]) -> list[fx.Node]:
    """The nodes among ``nodes``, in order, that depend on ``sources``, without the sources."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        if node not in sources and any(arg in sources or arg in found for arg in node.all_input_nodes):
            found[node] = None
    return list(found)


def _has_token_losses(program: Program, node: fx.Node) -> bool:
    """True for a reduced label loss, of class labels or class probabilities, whose operands have one row per token."""
    if node.target not in LABEL_LOSSES:
        return False
    given, axes = bind(node), program[TokenAxes]
    logits, target = given["self"], given["target"]
    classes = min(1, logits.meta["val"].ndim - 1)
    return (
        given["reduction"] in (MEAN, SUM)
        and axes.has_rows_of(axes.main, logits)
        and axes.has_rows_of(axes.main, target)
        and axes.row_dim(logits) != classes
    )


def _token_parallel(
    program: Program, nodes: list[fx.Node], loss: fx.Node, without: frozenset[Route] = frozenset()
) -> list[fx.Node]:
    """The operations that lead only to the loss and process each token independently, in order.

    A route belongs to them as a whole, with the keys that it sorts by, or not at all; those in ``without`` do not.
    """
    found, inside = {loss}, {*nodes}
    routes = program[Routes].by_node(inside)
    for node in reversed(nodes):
        users, route = [user for user in node.users if user in inside], routes.get(node)
        if node is loss or not all(user in found for user in users):
            continue
        if _is_token_parallel(program, node, inside) if route is None else route not in without:
            found.add(node)
    for node in nodes:  # a result of an operation with several results stays with the operation
        if node.target is operator.getitem and node.args[0] not in found:
            found.discard(node)
    if broken := {route for node, route in routes.items() if node in inside and node not in found} - without:
        return _token_parallel(program, nodes, loss, without | broken)
    found |= {node for node, route in routes.items() if route not in without}
    return [node for node in program.graph.nodes if node in found and node is not loss]


def _is_token_parallel(program: Program, node: fx.Node, inside: set[fx.Node]) -> bool:
    axes = program[TokenAxes]
    if not axes.has_rows_of(axes.main, node) or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    dim = axes.row_dim(node)
    carried = [axes.carried(node, i, dim) for i, arg in enumerate(operands_of(node)) if arg in inside]
    return all(place is not None for place in carried)
