"""Ditch stream: live operations re-executed on the kept rows, beside their values for all tokens.

Every value has one of three forms: its kept *rows*; *whole*, if it has no rows; or *full*, the rows scattered into the
seek stream's value. A value that a row reads at all positions (keys and values: its *context*) is the full value. With
``kv_grad="all"`` it is recomputed for all tokens from the full input of its block, so that its own projections stay
live.
"""

from __future__ import annotations

import operator
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..analysis.activity import Activity
from ..analysis.blocks import Blocks
from ..analysis.losses import class_factors
from ..analysis.moved_rows import MovedRows
from ..analysis.moves import MOVES
from ..analysis.routing import Routes
from ..analysis.row_index import RowIndex
from ..analysis.row_numbers import RowNumbers
from ..analysis.token_axes import TokenAxes
from ..analysis.values import feeds_attention, kind_of_value
from ..capture.retrace import Retrace, applied, is_autocast
from ..graph.errors import GraphNotSupported, located
from ..graph.factors import Axes
from ..graph.kinds import Kind, Mark, in_block, tagged
from ..graph.nodes import first_alike, is_tensor, made_by, operands_of
from ..graph.op_sets import LAYOUT, LOSSES
from ..graph.program import Program, attribute
from ..keep.frozen_rows import FrozenRows
from ..keep.live_kv import live_kv
from ..keep.recompute_kv import KVRecompute, Value, cast_by
from ..rows import row_rule_for
from ..rows.row_op import RowOp, pad_left
from ..rows.rules import rerun
from .autocast import Autocast
from .barriers import Barrier, barrier_at, refuse_lost_rows, refuse_partial_loss
from .linear_head import Head, find_head
from .routed import in_route

aten = torch.ops.aten


class DitchStream:
    """The ditch stream: for every live node its kept rows, or its whole value if it has no rows.

    Args:
        program: the analysed program.
        seek: the values of the seek stream.
        row_indices: the kept rows of every token axis.
        inputs: the inputs of the forward.
        kv_grad: "selected" or "all", as in ``Plan``.
        cast: values of the seek stream in the dtype that autocast converts them to.
    """

    def __init__(
        self,
        program: Program,
        seek: Mapping[fx.Node, Any],
        row_indices: Sequence[RowIndex],
        inputs: tuple,
        kv_grad: str = "selected",
        cast: Mapping[Value, torch.Tensor] | None = None,
    ) -> None:
        self.program, self.axes = program, program[TokenAxes]
        #: The nodes that are executed on the kept rows.
        self.live = program[Activity].live | program[Activity].drawn
        self.seek, self.barriers = seek, list[Barrier]()
        self._row_indices = {row_index.axis: row_index for row_index in row_indices}
        #: Values whose rows are not k rows along one dim: computed for all tokens, and cut.
        self.moved = program[MovedRows]
        self.row_numbers = RowNumbers(self.axes.space, self._row_indices.__getitem__, seek)
        self._inputs = dict(zip(program.placeholders, inputs, strict=True))
        self._rows: dict[fx.Node, Any] = {}
        self._whole: dict[fx.Node, Any] = {}
        self._merged: dict[fx.Node, torch.Tensor] = {}
        self._context: dict[fx.Node, Any] = {}
        self._known: dict[Any, torch.Tensor] = {}
        self.first_alike = first_alike(program.graph)
        self._in_context = live_kv(program) if kv_grad == "all" else frozenset()
        self._frozen_rows = found.nodes if (found := program.get(FrozenRows)) else frozenset()
        self._to_recompute = plan.nodes if (plan := program.get(KVRecompute)) else frozenset()
        self._recomputed, self._cast = dict[fx.Node, Any](), cast or {}
        #: Values that attentions by position read: recomputed keys and values, else those of the seek stream.
        self.looked_at = ChainMap(self._recomputed, seek)  # type: ignore[arg-type]
        self._autocast = Autocast(Retrace(program.module))

    def run(self, block: int = 1) -> int:
        """Execute the live nodes in blocks numbered from ``block``, and return the number of the last block."""
        classes = class_factors(self.program)
        routed = self.program[Routes].by_node(self.live)
        blocks = self.program.get(Blocks)
        ends = () if blocks is None else blocks.ends
        for node in self.program.graph.nodes:
            with in_block(block):
                self._run_node(node, classes, routed)
            if node in ends:
                self._autocast.reenter(block)
                block += 1
        return block

    def _run_node(self, node: fx.Node, classes: set[int], routed: Collection[fx.Node]) -> None:
        if node in self._to_recompute:
            with tagged(Kind.RECOMPUTED, node, Mark.RECOMPUTED):
                self._recomputed[node] = self._recompute(node)
        if is_autocast(node):
            self._autocast.run(node)
        elif node in routed:
            with tagged(Kind.ROWS, node), located(node):
                self._rows[node] = in_route(node, routed, self, self._rows)
        elif node in self.live:
            kind = kind_of_value(self.program, node, classes)
            kind = Kind.ROWS if kind in (Kind.ACTIVATIONS, Kind.KEYS_VALUES) else kind
            with tagged(kind, node), located(node):
                self._compute(node)
                if node in self._in_context and self.axes.has_rows(node):
                    self._context[node] = self._for_all_tokens(node)

    def context(self, node: fx.Node) -> Any:
        """The value as rows read it at all positions: the full value, or the one recomputed for all tokens."""
        return self._context[node] if node in self._context else self.full(node)

    def keeps_live(self, node: fx.Node) -> bool:
        """True if rows read this value live in all tokens (``kv_grad="all"``)."""
        return node in self._in_context

    def full(self, node: fx.Node) -> Any:
        """The value for all tokens: live in the kept rows, the seek stream's elsewhere."""
        if node not in self.live:
            return self.seek[node]
        if node in self._whole:
            return self._whole[node]
        if node not in self._merged:
            kind = self._kind_in_full(node)
            with tagged(kind, node, Mark.KEYS_VALUES if kind is Kind.KEYS_VALUES else None):
                self._merged[node] = self._merge(node)
        return self._merged[node]

    def rows(self, node: fx.Node, dim: int) -> torch.Tensor:
        """The kept rows of a value along one of its token dims."""
        if node in self._rows and dim == self.axes.row_dim(node):
            return self._rows[node]
        if node in self._frozen_rows and dim == self.axes.row_dim(node):
            self._operation(node)
            return self._rows[node]
        labels, axis = self.axes.of(node), self.axes.axis_at(self.axes.of(node)[dim])
        if self.keeps_live(node):
            return self.take(self.context(node), labels, dim)
        if node in self.live and node in self._rows and axis is not None and labels[dim] == axis.token:
            return self._rows_across(node, labels, dim)
        return self.take(self.full(node), labels, dim)

    def _rows_across(self, node: fx.Node, labels: Axes, dim: int) -> torch.Tensor:
        """Kept rows along ``dim`` of a value that is live in rows along another dim (scores that depend on keys alone).

        They are taken from both streams before these are combined, so that no block holds the value for all tokens of
        both dims.
        """
        with in_block(0):
            value = self.take(self.seek[node], labels, dim)
        return self.row_index_of(node).put(
            value, self.take(self._rows[node], labels, dim), labels, self.axes.row_dim(node)
        )

    def take(self, value: torch.Tensor, labels: Axes, dim: int) -> torch.Tensor:
        """The kept rows of a value with axes ``labels`` along ``dim``."""
        axis = self.axes.axis_at(labels[dim])
        assert axis is not None
        return self._row_indices[axis].take(value, labels, dim)

    def kept_keys(self, key: fx.Node, value: fx.Node) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The kept rows of keys and values, and their positions [B, m]; ``None`` if none of them carries gradient."""
        if key not in self.live and value not in self.live:
            return None
        return self.rows(key, 2), self.rows(value, 2), self.row_index_of(key).indices

    def row_index_of(self, node: fx.Node) -> RowIndex:
        """The row index of the token axis of a node's rows."""
        axis = self.axes.axis_of(node)
        assert axis is not None
        return self._row_indices[axis]

    def head_of(self, loss: fx.Node) -> Head | None:
        """The linear head of a loss over labels; ``None`` if other operations lead to it, or round the logits."""
        having = {node for node in self.program.graph.nodes if is_tensor(node) and self.axes.has_rows(node)}
        head = find_head(loss, having & self.live - self.moved.rows.keys(), having)
        return head if head is not None and head.dtype.itemsize >= head.product.itemsize else None

    def once(self, key: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A value without gradient that is needed in several places, computed once."""
        if key not in self._known:
            with in_block(0):
                self._known[key] = compute()
        return self._known[key]

    def aligned_rows(
        self, value: Any, labels: Axes, dim: int, like: Axes, result: torch.Tensor, rank: int
    ) -> torch.Tensor:
        """Kept rows of a value that all instances may share, given the batch dim of a result with axes ``like``.

        Raises:
            GraphNotSupported: that dim of the value is another axis.
        """
        axis = self.axes.axis_at(labels[dim])
        assert axis is not None
        if not axis.batch or axis.batch_dim_of(labels) is not None:
            return self.take(value, labels, dim)
        padded = pad_left(labels, rank)
        value = value.reshape((1,) * (rank - len(labels)) + tuple(value.shape))
        at = axis.batch_dim_of(like)
        if at is None or padded[at]:
            raise GraphNotSupported(
                "A value that all instances share is combined with per-instance rows, but has another axis in place of "
                "the batch."
            )
        value = value.expand([result.shape[at] if i == at else size for i, size in enumerate(value.shape)])
        padded = tuple(like[at] if i == at else label for i, label in enumerate(padded))
        return self.take(value, padded, dim + rank - len(labels))

    def _kind_in_full(self, node: fx.Node) -> Kind:
        if self._in_context and node in self.program[Blocks].stream:
            return Kind.BLOCK_INPUTS
        return Kind.KEYS_VALUES if feeds_attention(node) else Kind.BARRIER

    def _recompute(self, node: fx.Node) -> Any:
        """Compute a value of the seek stream again, without gradient."""

        def known(x: fx.Node) -> Any:
            source = (x, cast_by(node, x))
            return self._cast[source] if source in self._cast else self._without_grad(x)

        args, kwargs = fx.map_arg((node.args, node.kwargs), known)
        return node.target(*args, **kwargs)

    def _without_grad(self, node: fx.Node) -> Any:
        if node in self._recomputed or node.op != "placeholder":
            return self.looked_at[node]
        value = self._inputs[node]
        return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value

    def _for_all_tokens(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._context[node.args[0]][node.args[1]]
        return applied(node, *RowOp(node, self, None).in_context)

    # -- one node -----------------------------------------------------------------------------------------------------

    def _compute(self, node: fx.Node) -> None:
        if node in self.moved.rows:
            self._whole[node] = self._moved(node)
        elif node.op != "call_function":
            self._source(node)
        elif node.target is operator.getitem:
            self._getitem(node)
        elif not self.moved.rows.keys().isdisjoint(node.users) and not is_tensor(node):
            self._whole[node] = applied(node, *RowOp(node, self, None).in_full)
        else:
            self._operation(node)

    def _moved(self, node: fx.Node) -> Any:
        """A value whose rows are moved, for all tokens: without gradient in the rows outside the selection."""
        if node.target is operator.getitem:
            value = self._whole[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            call = RowOp(node, self, None)
            value = self._restricted(call) if node.target in LOSSES else NotImplemented
            value = applied(node, *call.in_context) if value is NotImplemented else value
        if (target := made_by(node).target) not in LAYOUT:
            self.barriers.append(barrier_at(node, self.live, self.axes, moved=True))
        if node in self._in_context or target in MOVES:
            return value
        kept = self.row_numbers.kept(self.moved.rows[node], self.axes.of(node))
        return torch.where(kept, value, value.detach())

    def _source(self, node: fx.Node) -> None:
        value = self._inputs[node] if node.op == "placeholder" else attribute(self.program.module, str(node.target))
        if self.axes.has_rows(node):
            self._rows[node] = self.take(value, self.axes.of(node), self.axes.row_dim(node))
        else:
            self._whole[node] = value

    def _getitem(self, node: fx.Node) -> None:
        source, index = node.args
        results = self._rows[source] if source in self._rows else self._whole[source]
        (self._rows if self.axes.has_rows(node) else self._whole)[node] = results[index]

    def _operation(self, node: fx.Node) -> None:
        if node in self.moved.lost:
            refuse_lost_rows(node)
        has_rows = self.axes.has_rows(node)
        call = RowOp(node, self, self.axes.row_dim(node) if has_rows else None)
        is_restricted = self._meets_rows(node) or call.moved is not None
        result = self._restricted(call) if is_restricted else NotImplemented
        if result is NotImplemented:
            result = self._in_full(call)
            if has_rows:
                result = self._take_each(node, result)
        elif has_rows:
            call.check(result)
        (self._rows if has_rows else self._whole)[node] = result

    def _meets_rows(self, node: fx.Node) -> bool:
        """False for an operation on parameters and values without rows only, which runs unchanged."""
        return any(map(self.axes.has_rows, (node, *(arg for arg in operands_of(node) if arg in self.live))))

    def _restricted(self, call: RowOp) -> Any:
        rule = row_rule_for(call.node)
        if rule is None and call.dim is None:
            return NotImplemented
        return (rule or rerun)(call)

    def _in_full(self, call: RowOp) -> Any:
        node = call.node
        if node.target in LOSSES:
            refuse_partial_loss(self.program, node)
        if self._meets_rows(node):
            self.barriers.append(barrier_at(node, self.live, self.axes))
        return applied(node, *call.in_context)

    def _take_each(self, node: fx.Node, result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return self.take(result, self.axes.of(node), self.axes.row_dim(node))
        return tuple(
            self._taken(x, self.axes.resolved(axes)) for x, axes in zip(result, self.axes.axes[node], strict=True)
        )

    def _taken(self, value: Any, labels: Axes) -> Any:
        """The rows of one of several results; the value itself if it has no rows (statistics)."""
        dim = next((i for i, label in enumerate(labels) if self.axes.axis_at(label) is not None), None)
        return value if dim is None or not isinstance(value, torch.Tensor) else self.take(value, labels, dim)

    def _merge(self, node: fx.Node) -> torch.Tensor:
        if node.target in LAYOUT and len(operands_of(node)) == 1:
            return applied(node, *RowOp(node, self, None).in_full)
        dim = self.axes.row_dim(node)
        return self.row_index_of(node).put(self.seek[node], self._rows[node], self.axes.of(node), dim)
