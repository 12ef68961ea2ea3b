"""Row numbers: the number ``b * T + t`` of the token of every row, and which rows of a value are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph.factors import Axes, Dim, Space
from ..graph.kinds import in_block
from .moves import Move, Rows, row_layout
from .row_index import RowIndex
from .token_axes import TokenAxis

aten = torch.ops.aten


class RowNumbers:
    """Row numbers of moved rows, computed once for every move, with the stream of all tokens.

    Args:
        row_index: returns the row index of a token axis.
        values: the values of nodes that moves read (indices, sizes).
    """

    def __init__(self, space: Space, row_index: Callable[[TokenAxis], RowIndex], values: Mapping[fx.Node, Any]) -> None:
        self._space, self.row_index, self._values = space, row_index, values
        self._known: dict[Any, Tensor] = {}

    def kept(self, rows: Rows, labels: Axes) -> Tensor:
        """True for the entries of a value with these axes that belong to kept tokens, or to no token.

        Bool; broadcasts to the value.
        """
        if (rows, labels) not in self._known:
            row_index = self.row_index(rows.axis)
            with in_block(0):
                none = torch.zeros(row_index.batch, row_index.tokens, dtype=torch.bool, device=row_index.indices.device)
                by_token = none.scatter(1, row_index.indices, True)
                self._known[rows, labels] = self._looked_up(by_token, True, rows, labels)
        return self._known[rows, labels]

    def weights(self, rows: Rows, labels: Axes) -> Tensor:
        """The weights of the entries of a value with these axes; 0 for tokens that are not kept, 1 for no token."""
        row_index = self.row_index(rows.axis)
        assert row_index.weights is not None
        none = row_index.weights.new_zeros((row_index.batch, row_index.tokens))
        return self._looked_up(none.scatter(1, row_index.indices, row_index.weights), 1, rows, labels)

    def _looked_up(self, by_token: Tensor, otherwise: Any, rows: Rows, labels: Axes) -> Tensor:
        """``by_token`` [B, T] at the row numbers; ``otherwise`` for rows of no token, whose number is the last one."""
        table = torch.cat([by_token.flatten(), by_token.new_full((1,), otherwise)])
        return table[self._laid_out(rows, labels)]

    def _numbers(self, rows: Rows) -> Tensor:
        """The row numbers, one dim for each factor of ``rows.factors``; int64."""
        if rows not in self._known:
            self._known[rows] = self._counted(rows) if rows.move is None else self._moved(rows, rows.move)
        return self._known[rows]

    def _counted(self, rows: Rows) -> Tensor:
        row_index = self.row_index(rows.axis)
        number = torch.arange(row_index.batch * row_index.tokens, device=row_index.indices.device)
        sizes = (*self._sizes(rows.batch, row_index.batch), *self._sizes(rows.token, row_index.tokens))
        return number.reshape(sizes)

    def _sizes(self, dim: Dim, size: Any) -> tuple[Any, ...]:
        """The sizes of the factors of a dim of this size."""
        inner = tuple(self._space.size((f,)) for f in dim[1:])
        return (size // prod(inner), *inner) if dim else ()

    def _moved(self, rows: Rows, move: Move) -> Tensor:
        sources = [
            self._laid_out(x, at) for x, at in zip(move.sources, move.before, strict=True) if isinstance(x, Rows)
        ]
        lengths = [self._values[x].shape for x in move.sources if isinstance(x, fx.Node)]
        given = pytree.tree_map_only(fx.Node, self._values.__getitem__, dict(move.arguments))
        arguments = {name: list(x) if isinstance(x, tuple) else x for name, x in given.items()}
        found = _APPLIED.get(move.target, _picked)(move, sources, lengths, arguments)
        found = found if move.item is None else found[move.item]
        sizes = [size for dim, n in zip(move.after, found.shape, strict=True) for size in self._sizes(dim, n)]
        order = sum(move.after, ())
        return found.reshape(sizes).permute([order.index(f) for f in rows.factors])

    def _laid_out(self, rows: Rows, labels: Axes) -> Tensor:
        """The row numbers laid out as a value with these axes; a dim without rows has size 1."""
        factors, numbers = rows.factors, self._numbers(rows)
        layout = row_layout(factors, labels)
        used = [dim if own else () for dim, own in zip(labels, layout, strict=True)]
        order = list(sum(layout, ()))
        numbers = numbers.permute([factors.index(f) for f in order])
        sizes = dict(zip(order, numbers.shape, strict=True))
        every = {f: sizes[f] if f in sizes else self._space.size((f,)) for dim in used for f in dim}
        numbers = numbers.reshape([sizes.get(f, 1) for dim in used for f in dim])
        numbers = numbers.expand([every[f] for dim in used for f in dim])
        return numbers.reshape([prod(every[f] for f in dim) for dim in used])


def _picked(move: Move, sources: list[Tensor], lengths: list, arguments: dict[str, Any]) -> Any:
    """The operation itself, on the row numbers of its only operand."""
    return move.target(sources[0], **arguments)


def _padded(move: Move, sources: list[Tensor], lengths: list, arguments: dict[str, Any]) -> Tensor:
    """Row numbers padded with -1, only along dims with rows."""
    rank = sources[0].ndim
    amounts = [n if move.before[0][rank - 1 - i // 2] else 0 for i, n in enumerate(arguments["pad"])]
    return aten.constant_pad_nd.default(sources[0], amounts, -1)


def _joined(move: Move, sources: list[Tensor], lengths: list, arguments: dict[str, Any]) -> Tensor:
    """Row numbers of joined operands, -1 where an operand has no rows."""
    known, left, shapes, dim = iter(sources), sources[0], iter(lengths), arguments["dim"]
    parts = []
    for source in move.sources:
        if isinstance(source, Rows):
            parts.append(next(known))
            continue
        shape = list(left.shape)
        if move.target is not aten.select_scatter.default or source is move.sources[0]:
            shape[dim] = next(shapes)[dim]
        parts.append(left.new_full(shape, -1))
    joins = move.target in (aten.cat.default, aten.stack.default)
    return move.target(parts, dim) if joins else move.target(*parts, **arguments)


def _gathered(move: Move, sources: list[Tensor], lengths: list, arguments: dict[str, Any]) -> Tensor:
    """Row numbers gathered by an index that is the same for all features."""
    (numbers,), index, dim = sources, arguments["index"], arguments["dim"] % sources[0].ndim
    for d in range(dim + 1, index.ndim):
        index = index.narrow(d, 0, 1) if numbers.shape[d] == 1 else index
    return numbers.gather(dim, index)


_APPLIED = {
    aten.gather.default: _gathered,
    aten.pad.default: _padded,
    aten.constant_pad_nd.default: _padded,
    **dict.fromkeys(
        (aten.cat.default, aten.stack.default, aten.slice_scatter.default, aten.select_scatter.default), _joined
    ),
}
