"""Moved rows: the token of every row where the token axis is sliced, permuted, padded, joined or split over dims.

A static slice or move is a view of the token axis: rows keep their tokens. So the row numbers of a result follow from
those of its operands, by the same operation. Where tokens are mixed (a convolution, a ``[T, T]`` matrix, a sort), a
result with T positions has the rows of the tokens that stand there, and any other result has no rows.

The analysis goes forward over the live values. It finds the values that can't be cut to k rows; the ditch stream
computes them for all tokens and cuts the gradient of the rows outside the selection.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.factors import Axes, Dim, same_size
from ..graph.nodes import bind, is_tensor, made_by, operands_of
from ..graph.op_sets import LAYOUT, LOSSES, PICKS
from ..graph.program import Program
from ..graph.registry import aten_overloads
from .activity import Activity
from .token_axes import TokenAxes, TokenAxis

aten = torch.ops.aten
#: Operations that read or move positions of their first operand.
_PICKS = aten_overloads(
    "slice.Tensor select.int split.Tensor split_with_sizes.default chunk.default tensor_split.sections unbind.int "
    "index_select.default index.Tensor gather.default flip.default roll.default pad.default constant_pad_nd.default"
)
_SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)
#: Operations that join several operands along a dim.
_JOINS = (aten.cat.default, aten.stack.default, *_SCATTERS)
#: Operations whose results are positions of their operands: what is cut there is cut in the result.
MOVES = frozenset((*_PICKS, *_JOINS, *LAYOUT))


@dataclass(frozen=True)
class Move:
    """One operation on row numbers.

    Args:
        target: the operation of the graph.
        arguments: its other arguments by name.
        item: the number of the result, for an operation with several results.
        sources: the rows of its tensor operands; an operand without rows is given as its node.
        before: for each source, the factors of rows in every dim of the operand.
        after: the factors of rows in every dim of the result.
    """

    target: Any
    arguments: tuple[tuple[str, Any], ...]
    item: int | None
    sources: tuple[Rows | fx.Node, ...]
    before: tuple[Axes, ...]
    after: Axes


@dataclass(frozen=True)
class Rows:
    """The rows of a value.

    Args:
        axis: the token axis.
        batch: the factors of the value that number the instances.
        token: the factors of the value that number the positions of an instance.
        move: the operation that moved the rows; ``None``: they are the tokens in order.
        mixed: every position combines several tokens, and there are more or fewer positions than tokens: no rows.
    """

    axis: TokenAxis
    batch: Dim
    token: Dim
    move: Move | None = None
    mixed: bool = False

    @property
    def factors(self) -> Dim:
        return self.batch + self.token


@dataclass(frozen=True)
class MovedRows:
    """The values whose rows are not k rows along one dim.

    Args:
        rows: their rows.
        lost: the operations behind which the tokens of rows are unknown.
    """

    rows: Mapping[fx.Node, Rows] = field(default_factory=dict)
    lost: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class FindMovedRows:
    """Follow the rows of tokens through slices, moves and operations that mix tokens.

    Reads ``Activity``, ``TokenAxes``; writes ``MovedRows``, and ``TokenAxes`` with the positions behind mixing
    operations as tokens and the axis of a loss over moved rows first.

    Args:
        given: the rows are given. Otherwise a token that the model picks from all tokens of a sequence is always kept,
            so that its row need not be cut.
    """

    given: bool = False
    name: str = "moved rows"

    def run(self, program: Program) -> Program:
        axes, live = program[TokenAxes], program[Activity].live
        while (follower := _followed(program, live, axes)).joined:
            resolved = (map(axes.space.resolve, (axis.token, axis.batch)) for axis in axes.tokens)
            axes = replace(axes, tokens=tuple(TokenAxis(*dims) for dims in resolved))
        moved = {n: rows for n, rows in follower.moved().items() if self.given or not _is_kept(rows)}
        over = [operands_of(node)[0] for node in live if node.target in LOSSES]
        of_losses = {moved[x].axis for x in over if x in moved}
        if of_losses and not any(axes.axis_of(x) == axes.main for x in over):
            axes = replace(axes, tokens=tuple(sorted(axes.tokens, key=lambda axis: axis not in of_losses)))
        return program.with_(axes, MovedRows(moved, frozenset(follower.lost)))

    def check(self, program: Program) -> None:
        """Moved rows carry gradient."""
        assert program[MovedRows].rows.keys() <= program[Activity].live


def _followed(program: Program, live: frozenset[fx.Node], axes: TokenAxes) -> _Follower:
    follower = _Follower(axes, live)
    for node in program.graph.nodes:
        if node in live and is_tensor(node) and node.op == "call_function":
            follower.visit(node)
    return follower


class _Follower:
    """Follows rows forward through a graph; ``joined``: a dim became a token axis on the way."""

    def __init__(self, axes: TokenAxes, live: frozenset[fx.Node]) -> None:
        self.axes, self.live, self.joined = axes, live, False
        self.known: dict[fx.Node, Rows] = {}
        self.lost: set[fx.Node] = set()

    def moved(self) -> dict[fx.Node, Rows]:
        """The values that have rows, but not those that their labels tell."""
        found = {node: rows for node, rows in self.known.items() if not rows.mixed}
        return {n: r for n, r in found.items() if r.move is not None or not self.axes.has_rows(n)}

    def visit(self, node: fx.Node) -> None:
        rows, labelled = self._rows(node, made_by(node)), self._by_label(node)
        if labelled is not None and (rows is None or rows.axis != labelled.axis):  # another axis with its own selection
            rows = labelled
        if rows is not None:
            self.known[node] = rows

    def _rows(self, node: fx.Node, operation: fx.Node) -> Rows | None:
        operands = operands_of(operation)
        known = [(i, self._of(x)) for i, x in enumerate(operands) if x in self.live and self._of(x) is not None]
        carried = [(dim, rows) for i, rows in known if (dim := self._carried(node, operation, i, rows)) is not None]
        if not known:
            return self._by_label(node)
        if not carried or self._joins_rows(operation, known):
            return self._behind(node, operation, dict(known))
        first = min(dim for dim, _ in carried)
        found = {rows for dim, rows in carried if dim == first}
        return found.pop() if len(found) == 1 else self._joined(node, list(found))

    def _of(self, node: fx.Node) -> Rows | None:
        """The rows of an operand."""
        return self.known[node] if node in self.known else self._by_label(node)

    def _by_label(self, node: fx.Node) -> Rows | None:
        axis = self.axes.axis_of(node) if self.axes.has_rows(node) else None
        return None if axis is None else Rows(axis, axis.batch, axis.token)

    def _carried(self, node: fx.Node, operation: fx.Node, operand: int, rows: Rows) -> int | None:
        """The first dim of the result that has tokens of these rows, if the operation carries all of their factors."""
        flow, before = self.axes.flows[operation], self.axes.of(operands_of(operation)[operand])
        after = self.axes.of(node)
        if flow.regrouped:
            kept = operand == 0 and {*rows.factors} <= {*sum(after, ())}
            return _dim_of(rows.factors[-1], after) if kept else None
        dims = [(_dim_of(f, before), _dim_of(f, after)) for f in rows.factors]
        if not dims or any(out is None or flow.carries[operand].get(out) != dim for dim, out in dims):
            return None
        return dims[-1][1]

    # -- operations that don't carry the rows -------------------------------------------------------------------------

    def _behind(self, node: fx.Node, operation: fx.Node, known: dict[int, Rows]) -> Rows | None:
        if operation.target in _PICKS and 0 in known:
            return self._moved(node, operation, [known[0]])
        if operation.target in _JOINS and (found := self._concatenated(node, operation, known)) is not None:
            return found
        return self._mixed(node, operation, known)

    def _moved(self, node: fx.Node, operation: fx.Node, sources: list[Rows | fx.Node]) -> Rows | None:
        """The rows of ``node``, by the operation on the row numbers of ``sources``."""
        first = next(rows for rows in sources if isinstance(rows, Rows))
        before = [self.axes.of(x) for x in operands_of(operation)[: len(sources)]]
        after = _rows_after(before[sources.index(first)], self.axes.of(node), first, operation)
        if after is None:
            self.lost.add(node)
            return None
        found = sum(after, ())
        batch = tuple(f for f in found if f in first.batch)
        token = tuple(f for f in found if f not in first.batch)
        if first.mixed or not found:
            return self._standing(node, first, token)
        layout = tuple(_layout(x, labels) for x, labels in zip(sources, before, strict=True))
        item = node.args[1] if node.target is operator.getitem else None
        move = Move(operation.target, _others(operation), item, tuple(sources), layout, after)  # type: ignore[arg-type]
        return Rows(first.axis, batch, token, move)

    def _joins_rows(self, operation: fx.Node, known: list[tuple[int, Rows]]) -> bool:
        """True for an operation that joins its operands along a dim that numbers their rows."""
        if operation.target is aten.stack.default:
            return len({rows for _, rows in known}) > 1
        if operation.target not in _JOINS:
            return False
        (dim,), operands = _acted_dims(operation, self.axes.of(operation)), operands_of(operation)
        labels = [
            (rows, self.axes.of(operands[i]))
            for i, rows in known
            if operands[i].meta["val"].ndim == operation.meta["val"].ndim
        ]
        return any({*of[dim]} & {*rows.factors} or not (of[dim] or rows.token) for rows, of in labels)

    def _concatenated(self, node: fx.Node, operation: fx.Node, known: dict[int, Rows]) -> Rows | None:
        """The rows of joined operands, if they are of one token axis; else ``None``."""
        scatters = operation.target in _SCATTERS
        if scatters and not (1 in known and known[1].move is not None):
            return None
        if len({rows.axis for rows in known.values()}) > 1 or any(rows.mixed for rows in known.values()):
            return None
        return self._moved(node, operation, [known.get(i, x) for i, x in enumerate(operands_of(operation))])

    def _mixed(self, node: fx.Node, operation: fx.Node, known: dict[int, Rows]) -> Rows | None:
        """The rows of positions that combine several tokens."""
        if (rows := self._by_label(node)) is not None:
            return rows
        for i, rows in known.items():
            if self.axes.flows[operation].unknown:
                self._keep_batch(node, operands_of(operation)[i], rows.axis)
            if label := self._new_label(node, operation, i, rows, known):
                return self._standing(node, rows, label)
        return None

    def _keep_batch(self, node: fx.Node, operand: fx.Node, axis: TokenAxis) -> None:
        """An unknown operation keeps the batch where it is, if the sizes are equal."""
        before, after, space = self.axes.of(operand), self.axes.of(node), self.axes.space
        dim = axis.batch_dim_of(before)
        if dim is not None and len(before) == len(after) and same_size(space.size(before[dim]), space.size(after[dim])):
            self._equate(before[dim], after[dim])

    def _new_label(self, node: fx.Node, operation: fx.Node, operand: int, rows: Rows, known: dict[int, Rows]) -> Dim:
        """The label of the result in place of the tokens of an operand; ``()`` if there is none."""
        operands = operands_of(operation)
        before, after = self.axes.of(operands[operand]), self.axes.of(node)
        others = {f for i in known for f in sum(self.axes.of(operands[i]), ())}
        same_rank = len(before) == len(after)
        places = [d for d in range(len(after)) if not same_rank or {*before[d]} & {*rows.token}]
        return sum((after[d] for d in places if not {*after[d]} & others), ())

    def _standing(self, node: fx.Node, rows: Rows, label: Dim) -> Rows | None:
        """Rows at ``label``: those of the tokens if there are as many positions, else none."""
        space, axis = self.axes.space, rows.axis
        if not label:
            return None
        has_batch = {*axis.batch} <= {*sum(self.axes.of(node), ())}
        if has_batch and same_size(space.size(label), space.size(axis.token)):
            self._equate(axis.token, label)
            return self._by_label(node)
        return Rows(axis, axis.batch, label, mixed=True)

    def _equate(self, known: Dim, label: Dim) -> None:
        if self.axes.space.resolve(label) != self.axes.space.resolve(known):
            self.axes.space.equate(known, label)
            self.joined = True

    def _joined(self, node: fx.Node, found: list[Rows]) -> Rows | None:
        """The rows of a value that combines different rows: mixed tokens."""
        if (rows := self._by_label(node)) is not None:
            return rows
        rows = self._standing(node, found[0], found[0].token)
        if rows is not None and rows.mixed and not any(x.mixed for x in found):
            self.lost.add(node)
        return rows


def _is_kept(rows: Rows) -> bool:
    """True for one token of a sequence, picked from all of them."""
    move = rows.move
    return (
        not rows.token
        and move is not None
        and move.target in PICKS
        and isinstance(move.sources[0], Rows)
        and (move.sources[0].move is None)
    )


def _layout(source: Rows | fx.Node, labels: Axes) -> Axes:
    """The factors of rows in every dim of an operand."""
    factors = source.factors if isinstance(source, Rows) else ()
    return tuple(tuple(f for f in dim if f in factors) for dim in labels)


def _rows_after(before: Axes, after: Axes, rows: Rows, operation: fx.Node) -> Axes | None:
    """The factors of rows in every dim of a result; ``None`` if rows can't be followed through the operation."""
    acted = _acted_dims(operation, before)
    if acted is None or not all({*before[d]} <= {*rows.factors} for d in acted):
        return None
    same = {f for d, dim in enumerate(before) if d not in acted for f in dim if f not in rows.factors}
    return tuple(tuple(f for f in dim if f not in same) for dim in after)


def _acted_dims(operation: fx.Node, before: Axes) -> list[int] | None:
    """The dims whose positions an operation moves; ``None`` if it is not a static move."""
    given, rank = bind(operation), len(before)
    if operation.target is aten.index.Tensor:
        dims = [d for d, where in enumerate(given["indices"]) if where is not None]
        integers = all(where.meta["val"].dtype == torch.int64 for where in operands_of(operation)[1:])
        return dims if integers and dims == [*range(dims[0], dims[-1] + 1)] else None
    if "pad" in given:
        constant = given.get("mode", "constant") == "constant"
        padded = {rank - 1 - i // 2 for i, n in enumerate(given["pad"]) if not same_size(n, 0)}
        return sorted(padded) if constant else None
    if operation.target is aten.stack.default:
        return []
    if operation.target is aten.gather.default and not _is_by_row(given["index"].meta["val"], given["dim"]):
        return None
    dims = given.get("dims", given.get("dim"))
    dims = [dims] if isinstance(dims, int) else dims
    return [d % rank for d in dims] or None


def _is_by_row(index: Tensor, dim: int) -> bool:
    """True if an index of ``gather`` was expanded over the features behind ``dim``, so that whole rows are gathered."""
    features = [*zip(index.stride(), index.shape, strict=True)][dim % index.ndim + 1 :]
    return all(stride == 0 or same_size(size, 1) for stride, size in features)


def _others(operation: fx.Node) -> tuple[tuple[str, Any], ...]:
    """The arguments that are not the operands whose rows are followed, hashable."""
    skipped = {"self", "input", "tensors", "src"}
    return tuple((name, _frozen(value)) for name, value in bind(operation).items() if name not in skipped)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _dim_of(factor: int, labels: Axes) -> int | None:
    return next((i for i, dim in enumerate(labels) if factor in dim), None)
