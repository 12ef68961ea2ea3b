"""Moves: operations whose results are positions of their operands, and the row numbers that follow from them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.factors import Axes, Dim, same_size
from ..graph.nodes import bind, operands_of
from ..graph.op_sets import LAYOUT
from ..graph.registry import aten_overloads
from .token_axes import TokenAxis

aten = torch.ops.aten
#: Operations that read or move positions of their first operand.
POSITIONS = aten_overloads(
    "slice.Tensor select.int split.Tensor split_with_sizes.default chunk.default tensor_split.sections unbind.int "
    "index_select.default index.Tensor gather.default flip.default roll.default pad.default constant_pad_nd.default"
)
SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)
#: Operations that join several operands along a dim.
JOINS = (aten.cat.default, aten.stack.default, *SCATTERS)
#: Operations whose results are positions of their operands: what is cut there is cut in the result.
MOVES = frozenset((*POSITIONS, *JOINS, *LAYOUT))


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


def row_layout(factors: Collection[int], labels: Axes) -> Axes:
    """The factors of rows in every dim of a value: those of ``factors``, each in the first dim that has it.

    Scores have the tokens twice; their rows are the queries.
    """
    layout, seen = [], set[int]()
    for dim in labels:
        layout.append(tuple(f for f in dim if f in factors and f not in seen))
        seen.update(layout[-1])
    return tuple(layout)


def rows_after(before: Axes, after: Axes, rows: Rows, operation: fx.Node) -> Axes | None:
    """The factors of rows in every dim of a result; ``None`` if rows can't be followed through the operation."""
    acted, layout = acted_dims(operation, before), row_layout(rows.factors, before)
    if acted is None or any(before[d] != layout[d] for d in acted):
        return None
    same = {f for d, dim in enumerate(before) if d not in acted for f in dim if f not in rows.factors}
    return row_layout({*sum(after, ())} - same, after)


def acts_on_features(operation: fx.Node, before: Axes, rows: Rows) -> bool:
    """True if an operation moves positions of features alone."""
    acted, layout = acted_dims(operation, before) or [], row_layout(rows.factors, before)
    return any(before[d] for d in acted) and not any(layout[d] for d in acted)


def acts_on(operation: fx.Node, before: Axes, factors: Dim) -> bool:
    """True if an operation moves positions of these factors alone."""
    acted = {f for d in acted_dims(operation, before) or () for f in before[d]}
    return bool(acted) and acted <= {*factors}


def acted_dims(operation: fx.Node, before: Axes) -> list[int] | None:
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
    if operation.target is aten.gather.default:  # the index has the dims before as well
        dim = given["dim"] % rank
        return [*range(dim + 1)] if _is_by_row(given["index"], dim) else None
    dims = given.get("dims", given.get("dim"))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims or [])] or None


def _is_by_row(index: fx.Node, dim: int) -> bool:
    """True if an index of ``gather`` was expanded over the features behind ``dim``, so that whole rows are gathered."""
    repeated = index.args[0] if index.target is aten.repeat.default else index
    value = repeated.meta["val"]  # type: ignore[union-attr]
    features = [*zip(value.stride(), value.shape, strict=True)][dim + 1 :]
    return all(stride == 0 or same_size(size, 1) for stride, size in features)


def arguments_of(operation: fx.Node) -> tuple[tuple[str, Any], ...]:
    """The arguments that are not the operands whose rows are followed, hashable."""
    skipped = {"self", "input", "tensors", "src"}
    return tuple((name, _frozen(value)) for name, value in bind(operation).items() if name not in skipped)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def dim_of(factor: int, labels: Axes) -> int | None:
    return next((i for i, dim in enumerate(labels) if factor in dim), None)
