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

import torch
from torch import fx

from ..graph.factors import Dim, same_size
from ..graph.nodes import bind, is_tensor, made_by, operands_of
from ..graph.op_sets import LOSSES, PICKS
from ..graph.program import Program
from ..rules.attention import attention_op
from .activity import Activity
from .moves import (
    JOINS,
    POSITIONS,
    SCATTERS,
    Move,
    Rows,
    acts_on,
    acts_on_features,
    arguments_of,
    dim_of,
    row_layout,
    rows_after,
)
from .routing import Routes
from .token_axes import TokenAxes, TokenAxis

aten = torch.ops.aten


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

    Reads ``Activity``, ``TokenAxes``, ``Routes``; writes ``MovedRows``, and ``TokenAxes`` with the positions behind
    mixing operations as tokens and the axis of a loss over moved rows first.

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
            axes = replace(axes, tokens=tuple(dict.fromkeys(TokenAxis(*dims) for dims in resolved)))
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
    follower, without = _Follower(axes, live), program[Routes].by_node(live).keys() | axes.pooling
    for node in program.graph.nodes:
        if node in live and node not in without and is_tensor(node) and node.op == "call_function":
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
        found = {i: self.known.get(x) or self._by_label(x) for i, x in enumerate(operands) if x in self.live}
        known = {i: rows for i, rows in found.items() if rows is not None}
        if not known:
            return self._by_label(node)
        dims = {i: self._carried(node, operation, i, rows) for i, rows in known.items()}
        carried = [(dim, known[i]) for i, dim in dims.items() if dim is not None]
        if not carried or self._joins_rows(operation, known):
            return self._behind(node, operation, known)
        # rows are combined with values without rows, and with one row per sequence, which is broadcast
        carried = [x for x in carried if x[1].token and not x[1].mixed] or carried
        first = min(dim for dim, _ in carried)
        several = list(dict.fromkeys(rows for dim, rows in carried if dim == first))
        return several[0] if len(several) == 1 else self._combined(node, several)

    def _by_label(self, node: fx.Node) -> Rows | None:
        """The tokens in order, in one dim or split over several, by the factors of the dims."""
        axis, factors = self.axes.axis_of(node), {*sum(self.axes.of(node), ())}
        if node in self.axes.pooling:
            return None
        if axis is None or not self.axes.has_rows(node):
            axis = next((axis for axis in self.axes.tokens if {*axis.batch, *axis.token} <= factors), None)
        return None if axis is None else Rows(axis, axis.batch, axis.token)

    def _carried(self, node: fx.Node, operation: fx.Node, operand: int, rows: Rows) -> int | None:
        """The first dim of the result that has tokens of these rows, if the operation carries all of their factors."""
        flow, before = self.axes.flows[operation], self.axes.of(operands_of(operation)[operand])
        after = self.axes.of(node)
        if flow.regrouped:
            kept = operand == 0 and {*rows.factors} <= {*sum(after, ())}
            return dim_of(rows.factors[-1], after) if kept else None
        dims = [(dim_of(f, before), dim_of(f, after)) for f in rows.factors]
        if not dims or any(out is None or flow.carries[operand].get(out) != dim for dim, out in dims):
            return None
        return dims[-1][1]

    # -- operations that don't carry the rows -------------------------------------------------------------------------

    def _behind(self, node: fx.Node, operation: fx.Node, known: dict[int, Rows]) -> Rows | None:
        if operation.target in POSITIONS and 0 in known:
            return self._moved(node, operation, [known[0]])
        if self.axes.flows[operation].regrouped and not known[0].mixed:  # a view that cuts across other views
            self.lost.add(node)
            return None
        if operation.target in JOINS and (found := self._concatenated(node, operation, known)) is not None:
            return found
        return self._mixed(node, operation, known)

    def _moved(self, node: fx.Node, operation: fx.Node, sources: list[Rows | fx.Node]) -> Rows | None:
        """The rows of ``node``, by the operation on the row numbers of ``sources``."""
        first = next(rows for rows in sources if isinstance(rows, Rows))
        before = [self.axes.of(x) for x in operands_of(operation)[: len(sources)]]
        own = before[sources.index(first)]
        if acts_on_features(operation, own, first) and {*first.factors} <= {*sum(self.axes.of(node), ())}:
            return first
        after = rows_after(own, self.axes.of(node), first, operation)
        if after is None:
            rows = self._mixed(node, operation, {i: x for i, x in enumerate(sources) if isinstance(x, Rows)})
            mixes = operation.target is aten.pad.default or self._sorts(operation)  # padding by reflection mixes
            other = self._by_label(node)
            if not mixes and (other is None or other.axis == first.axis):
                self.lost.add(node)
            return rows
        found = sum(after, ())
        of_batch = acts_on(operation, own, first.batch)
        batch = tuple(f for f in found if f in first.batch or (of_batch and f not in first.token))
        token = tuple(f for f in found if f not in batch)
        if first.mixed or not found:
            return self._standing(node, first, token)
        factors = [x.factors if isinstance(x, Rows) else () for x in sources]
        layout = tuple(map(row_layout, factors, before))
        item = node.args[1] if node.target is operator.getitem else None
        if (other := self._by_label(node)) is not None and other.axis != first.axis:
            return self._standing(node, first, token)
        arguments = arguments_of(operation)
        move = Move(operation.target, arguments, item, tuple(sources), layout, after)  # type: ignore[arg-type]
        return Rows(first.axis, batch, token, move)

    def _sorts(self, operation: fx.Node) -> bool:
        """True for positions that depend on activations: they mix tokens. Other positions are a move."""
        if operation.target not in POSITIONS:
            return False
        pending, seen = operands_of(operation)[1:], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in self.known:
                return True
            if node not in seen:
                seen.add(node)
                pending += node.all_input_nodes
        return False

    def _joins_rows(self, operation: fx.Node, known: dict[int, Rows]) -> bool:
        """True for an operation that joins its operands along a dim that numbers their rows."""
        if operation.target is aten.stack.default:
            return len({*known.values()}) > 1
        if operation.target not in JOINS:
            return False
        dim, operands = bind(operation)["dim"], operands_of(operation)
        labels = [
            (rows, self.axes.of(operands[i]))
            for i, rows in known.items()
            if operands[i].meta["val"].ndim == operation.meta["val"].ndim
        ]
        return any(row_layout(rows.factors, of)[dim] or not (of[dim] or rows.token) for rows, of in labels)

    def _concatenated(self, node: fx.Node, operation: fx.Node, known: dict[int, Rows]) -> Rows | None:
        """The rows of joined operands, if they are of one token axis; else ``None``."""
        part = known.get(1) if operation.target in SCATTERS else None
        if operation.target in SCATTERS and (part is None or part.move is None):
            return None
        place = (part.move.sources, part.move.arguments) if part and part.move else None
        if place == ((known.get(0),), arguments_of(operation)):
            return known[0]  # written back to its own place
        if len({rows.axis for rows in known.values()}) > 1 or any(rows.mixed for rows in known.values()):
            return None
        return self._moved(node, operation, [known.get(i, x) for i, x in enumerate(operands_of(operation))])

    def _mixed(self, node: fx.Node, operation: fx.Node, known: dict[int, Rows]) -> Rows | None:
        """The rows of positions that combine several tokens."""
        labelled = self._by_label(node)
        if attention_op(operation) is not None:  # its queries have no rows of these axes
            return labelled
        for i, rows in known.items():
            if self.axes.flows[operation].unknown:
                self._keep_batch(node, operands_of(operation)[i], rows.axis)
            label = self._new_label(node, operation, i, rows, known)
            standing = self._standing(node, rows, label) if label else None
            if standing is not None and not (standing.mixed and labelled):
                return standing
        return labelled

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
        own = {dim_of(f, before) for f in rows.token}  # the first dims: those of scores [T, T] are the queries
        places = [d for d in range(len(after)) if not same_rank or d in own]
        return sum((after[d] for d in places if not {*after[d]} & others), ())

    def _standing(self, node: fx.Node, rows: Rows, label: Dim) -> Rows | None:
        """Rows at ``label``: those of the tokens if there are as many positions, else none."""
        space, axis = self.axes.space, rows.axis
        if not label:
            return None
        has_batch = {*axis.batch} <= {*sum(self.axes.of(node), ())}
        if has_batch and same_size(space.size(label), space.size(axis.token)):
            self._equate(axis.token, label)
            if {*space.resolve(axis.token)} <= {*sum(self.axes.of(node), ())}:
                return self._by_label(node)
            self.lost.add(node)
            return None
        return Rows(axis, axis.batch, label, mixed=True)

    def _equate(self, known: Dim, label: Dim) -> None:
        """State that a dim is the same axis; factors of other sizes stay distinct."""
        resolve, before = self.axes.space.resolve, self.axes.space.resolve(known)
        if resolve(label) != before:
            self.axes.space.equate(known, label)
            self.joined |= resolve(label) == resolve(known) or resolve(known) != before

    def _combined(self, node: fx.Node, found: list[Rows]) -> Rows | None:
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
