"""Row op: one operation of the ditch stream, with operands restricted to the kept rows or in full."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..analysis.moved_rows import MovedRows
from ..analysis.moves import Rows
from ..analysis.row_index import RowIndex
from ..analysis.row_numbers import RowNumbers
from ..analysis.token_axes import TokenAxes
from ..graph.errors import InvariantBroken
from ..graph.factors import Axes, Dim
from ..graph.nodes import bind, is_tensor, operands_of
from ..graph.program import Program, where


class LabelHead(Protocol):
    """A linear head fused with its loss over labels."""

    def losses(self, streams: Streams) -> Tensor:
        """The losses of the rows."""
        ...


class Streams(Protocol):
    """The two streams, as row rules use them."""

    program: Program
    axes: TokenAxes
    seek: Mapping[fx.Node, Any]
    """Values for all tokens, without gradient."""
    live: Collection[fx.Node]
    """The nodes that are executed on the kept rows."""
    looked_at: Mapping[fx.Node, Any]
    """Values of all tokens that attentions by position read."""
    first_alike: Mapping[fx.Node, fx.Node]
    """The first node that computes the same value, for every node."""
    moved: MovedRows
    """Values whose rows are not k rows along one dim; their full values are cut."""
    row_numbers: RowNumbers
    """The row numbers of moved rows."""

    def full(self, node: fx.Node) -> Any:
        """The value for all tokens."""
        ...

    def rows(self, node: fx.Node, dim: int) -> Tensor:
        """The kept rows of a value along one of its token dims."""
        ...

    def context(self, node: fx.Node) -> Any:
        """The value as rows read it at all positions."""
        ...

    def keeps_live(self, node: fx.Node) -> bool:
        """True if rows read this value live in all tokens."""
        ...

    def kept_keys(self, key: fx.Node, value: fx.Node) -> tuple[Tensor, Tensor, Tensor] | None:
        """The kept rows of keys and values, and their positions; ``None`` if none of them carries gradient."""
        ...

    def row_index_of(self, node: fx.Node) -> RowIndex:
        """The row index of the token axis of a node's rows."""
        ...

    def head_of(self, loss: fx.Node) -> LabelHead | None:
        """The linear head of a loss over labels, if there is one."""
        ...

    def once(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """The result of ``compute``, called only the first time for this key."""
        ...

    def aligned_rows(self, value: Any, labels: Axes, dim: int, like: Axes, result: Tensor, rank: int) -> Tensor:
        """Kept rows of a value that all instances may share, for a result with axes ``like``."""
        ...


@dataclass(frozen=True)
class RowOp:
    """One operation of the ditch stream.

    Args:
        node: the operation.
        streams: the two streams.
        dim: the dim of the result whose rows are tokens; ``None``: the result has no rows.
    """

    node: fx.Node
    streams: Streams
    dim: int | None

    @property
    def target(self) -> Any:
        return self.node.target

    @cached_property
    def row_index(self) -> RowIndex:
        """The row index of its token axis; for a result without rows, that of its first operand with rows."""
        if self.moved is not None:
            return self.streams.row_numbers.row_index(self.moved.axis)
        having = (node for node in (self.node, *self.operands) if self.streams.axes.axis_of(node) is not None)
        return self.streams.row_index_of(next(having))

    @property
    def moved(self) -> Rows | None:
        """The rows of its first operand if they are moved: that operand is in full, and cut."""
        rows = self.streams.moved.rows.get(self.operands[0])
        return rows if self.dim is None and rows is not None and rows.token else None

    def kept(self, labels: Axes) -> Tensor:
        """For moved rows: True where a value with these axes belongs to kept tokens; bool, broadcasts to the value."""
        assert self.moved is not None
        return self.streams.row_numbers.kept(self.moved, labels)

    @cached_property
    def operands(self) -> list[fx.Node]:
        return operands_of(self.node)

    def __getitem__(self, name: str) -> Any:
        """An argument by its schema name; tensors in full."""
        return self._mapped(bind(self.node)[name], self.streams.full)

    def arguments_but(self, *names: str) -> dict[str, Any]:
        """The arguments by schema name except ``names``, which the rule passes itself; tensors in full."""
        return {name: self[name] for name in bind(self.node) if name not in names}

    def rank(self, operand: int) -> int:
        return self.operands[operand].meta["val"].ndim

    @property
    def shape(self) -> list:
        """The shape of the result restricted to the kept rows."""
        assert self.dim is not None
        return self.row_index.row_shape(self.streams.seek[self.node].shape, self.dim)

    def check(self, result: Any) -> None:
        """The result has the shape of its rows; a wrong axes rule would otherwise broadcast silently."""
        if isinstance(result, Tensor) and list(result.shape) != self.shape:
            raise InvariantBroken(
                f"{self.target} on the kept rows returned shape {list(result.shape)}, but its axes give {self.shape} "
                f"(at {where(self.node)})."
            )

    @property
    def carries_rows(self) -> bool:
        """True if some operand carries the rows of the result."""
        return any(self.carried(i) is not None for i in range(len(self.operands)))

    def full(self, operand: int) -> Tensor:
        return self.streams.full(self.operands[operand])

    def rows(self, operand: int) -> Tensor:
        """The operand restricted to the kept rows if it carries those of the result, else as ``context``."""
        dim = self.carried(operand)
        return self.context(operand) if dim is None else self._restricted(operand, dim)

    def context(self, operand: int) -> Tensor:
        """An operand that a row reads at all positions, such as keys and values."""
        return self.streams.context(self.operands[operand])

    def own_rows(self, operand: int) -> Tensor:
        """The operand restricted along its own row dim, for results without rows (losses)."""
        node = self.operands[operand]
        dim = None if self.moved is not None else self.streams.axes.row_dim(node)
        return self.streams.full(node) if dim is None else self.streams.rows(node, dim)

    @property
    def args(self) -> tuple:
        """The positional arguments of the call, restricted as in ``rows``."""
        return self._call_arguments[0]

    @property
    def kwargs(self) -> dict:
        """The keyword arguments of the call, restricted as in ``rows``."""
        return self._call_arguments[1]

    @property
    def in_full(self) -> tuple[tuple, dict]:
        """The args and kwargs of the call with every operand in full."""
        return self._mapped((self.node.args, self.node.kwargs), self.streams.full)

    @property
    def in_context(self) -> tuple[tuple, dict]:
        """The args and kwargs of the call with every operand as ``context``."""
        return self._mapped((self.node.args, self.node.kwargs), self.streams.context)

    # -- how operands are restricted ----------------------------------------------------------------------------------

    @cached_property
    def _call_arguments(self) -> tuple[tuple, dict]:
        counter = iter(range(len(self.operands)))
        return self._mapped((self.node.args, self.node.kwargs), lambda _: self.rows(next(counter)))

    def _mapped(self, value: Any, tensor: Callable[[fx.Node], Any]) -> Any:
        def leaf(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            return tensor(arg) if is_tensor(arg) else self.streams.seek[arg]

        return pytree.tree_map(leaf, value)

    def carried(self, operand: int) -> int | None:
        """The operand's dim that carries the token rows of the result; ``None`` if it has none."""
        if self.dim is None:
            return None
        axes, node = self.streams.axes, self.operands[operand]
        dim = axes.carried(self.node, operand, self.dim)
        return dim if dim is not None and dim in axes.token_dims(node) else None

    def _restricted(self, operand: int, dim: int) -> Tensor:
        streams, node = self.streams, self.operands[operand]
        if node in streams.live:
            return self._rows_of(node, dim)
        return streams.once(
            (streams.first_alike[node], dim, *self.place_of_batch(self.node)), lambda: self._rows_of(node, dim)
        )

    def place_of_batch(self, node: fx.Node) -> tuple:
        """The rank, batch dim and batch label of ``node``.

        They decide how rows that all instances share are expanded.
        """
        labels = self.streams.axes.of(node)
        at = self.row_index.axis.batch_dim_of(labels)
        return (len(labels), at, None if at is None else labels[at])

    def _rows_of(self, node: fx.Node, dim: int) -> torch.Tensor:
        streams, labels = self.streams, self.streams.axes.of(self.node)
        if streams.axes.has_rows(node):
            return streams.rows(node, dim)
        return streams.aligned_rows(
            streams.full(node), streams.axes.of(node), dim, labels, streams.seek[self.node], len(labels)
        )


def pad_left(labels: tuple[Dim, ...], rank: int) -> tuple[Dim, ...]:
    """``labels`` with empty labels in front, ``rank`` in all."""
    return ((),) * (rank - len(labels)) + labels
