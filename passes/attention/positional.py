"""PositionalAttention: attentions that can read keys and values as they are and mask by position.

Such an attention becomes ``ops.attention.selected_attention``: keys and values are not repeated for groups of heads,
the kept rows are not written into them, and neither masks nor scores have a dim for the queries. It must be an
attention operation or eager attention (``eager``), of [B, H, T, E] with the tokens as one dim, without dropout of the
attention weights, and with a mask that compares positions (``masks``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...ops.attention import selected_attention
from ...ops.received import received
from ..analysis.activity import Activity
from ..analysis.attentions import Attention
from ..analysis.moved_rows import MovedRows
from ..analysis.token_axes import TokenAxes
from ..graph.factors import same_size
from ..graph.nodes import is_tensor
from ..graph.op_sets import COPIES, VIEWS
from ..graph.program import Program
from ..graph.strides import copied_in_order, order_in_memory
from ..rules.attention import AttentionOp, attention_op
from .eager import read_scores
from .mask_reader import read_mask
from .masks import Mask

aten = torch.ops.aten


@dataclass(frozen=True)
class PositionalAttention:
    """One attention.

    Args:
        query: the node of the query, [B, H, T, E].
        key, value: nodes [B, Hkv, S, E], before heads are repeated.
        mask: which keys each query sees.
        scale: factor of the scores; None: 1 / sqrt(E).
        dtype: that of the products, which differs from that of the operands under autocast.
        softcap: cap of the scores; 0: none.
        sinks: a score for each head that joins the softmax and has no value, H numbers.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: Mask
    scale: float | None
    dtype: torch.dtype
    softcap: float = 0.0
    sinks: fx.Node | None = None

    @property
    def context(self) -> tuple[fx.Node, ...]:
        """The nodes that the queries need as a whole, for all keys."""
        sinks = () if self.sinks is None else (self.sinks,)
        return (self.key, self.value, *self.mask.nodes, *sinks)

    def __call__(
        self, values: Mapping[fx.Node, Any], query: Tensor, positions: Tensor, live: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Attention of ``query`` [B, H, k, E] at ``positions`` [B, k] to the keys in ``values``.

        ``live``: the rows of key and value that get gradient, and their positions [B, m].
        """
        out, _ = self._attend(values, query, positions, live)
        return out

    def _attend(
        self, values: Mapping[fx.Node, Any], query: Tensor, positions: Tensor, live: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """The attention and the log-sum-exp of the scores."""
        row_key, row_value, columns = live or (None, None, None)
        operands = (query, row_key, row_value, values[self.key], values[self.value])
        with_means = self.sinks is None  # sinks take all of the softmax of a query that sees no key
        return selected_attention(
            *map(self._cast, operands),
            positions if self.mask.by_position else None,
            columns=columns,
            visibility=self.mask.at(values, positions if with_means else None),
            scale=self.scale,
            softcap=self.softcap,
            sinks=None if self.sinks is None else values[self.sinks].flatten(),
            return_lse=True,
        )

    def _cast(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype is self.dtype else x.to(self.dtype)

    def of_all_tokens(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """The attention of all tokens, with gradient for all keys and values."""
        query, key, value = (values[node] for node in (self.query, self.key, self.value))
        rows, columns = (torch.arange(x.shape[2], device=x.device).expand(x.shape[0], -1) for x in (query, key))
        return self(values, query, rows, (key, value, columns))

    def received(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """The attention that each key receives from all queries, [B, H, S]."""
        query, lse = values[self.query], None
        if self.sinks is not None:
            positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
            _, lse = self._attend(values, query, positions, None)
        key = self._cast(values[self.key])
        return received(self._cast(query), key, self.mask.at(values), self.scale, self.softcap, lse)


class PositionalAttentions(dict[fx.Node, PositionalAttention]):
    """The attentions that qualify, by the node of their result."""


@dataclass(frozen=True)
class FindPositionalAttention:
    """Find the attentions that can mask by position.

    Reads ``TokenAxes``, ``MovedRows``, ``Activity``; writes ``PositionalAttentions``.
    """

    name: str = "positional attention"

    def run(self, program: Program) -> Program:
        masks: dict[fx.Node | None, Mask | None] = {}
        eager = {a.out: a for a in program[TokenAxes].attentions if attention_op(a.node) is None}
        found = PositionalAttentions()
        for node in program.graph.nodes:
            attention, operation = None, attention_op(node)
            if operation is not None:
                if operation.mask not in masks:
                    masks[operation.mask] = read_mask(operation.mask)
                attention = _read(program, node, operation, masks[operation.mask])
            elif node in eager:
                attention = _read_eager(program, eager[node])
            if attention is not None:
                found[node] = attention
        return program.with_(found)

    def check(self, program: Program) -> None:
        """Nothing to check: an attention that does not qualify runs as it is."""


def _read(program: Program, node: fx.Node, given: AttentionOp, mask: Mask | None) -> PositionalAttention | None:
    """Read an attention operation."""
    if mask is None or given.dropout_p or not is_tensor(node):
        return None
    if given.is_causal:
        mask = replace(mask, causal=True)
    form = (mask, given.scale, node.meta["val"].dtype, given.softcap, given.sinks)
    found = PositionalAttention(given.query, given.key, given.value, *form)
    return _qualified(program, found, is_repeated=not given.enable_gqa)


def _read_eager(program: Program, attention: Attention) -> PositionalAttention | None:
    """Read an eager attention: matmul and softmax."""
    found, out = read_scores(attention), attention.out
    if found is None:
        return None
    form = (found.mask, found.scale, out.meta["val"].dtype, found.softcap, found.sinks)
    return _qualified(program, PositionalAttention(found.query, found.key, out.args[1], *form), is_repeated=True)


def _qualified(program: Program, attention: PositionalAttention, is_repeated: bool) -> PositionalAttention | None:
    """``attention`` with its key and value before heads are repeated.

    None if the tokens are not one dim of query, key and value, in order, or the mask is trained.
    """
    axes, (query, key, value) = program[TokenAxes], (attention.query, attention.key, attention.value)
    if attention.mask.added in program[Activity].live or not all(_is_by_token(axes, x) for x in (query, key, value)):
        return None
    key, value = map(_before_groups, (key, value)) if is_repeated else (key, value)
    if {query, key, value} & program[MovedRows].rows.keys():
        return None
    heads, groups = query.meta["val"].shape[1], key.meta["val"].shape[1]
    if not same_size(groups, value.meta["val"].shape[1]) or not isinstance(heads, int) or heads % groups:
        return None
    return replace(attention, key=key, value=value)


def _is_by_token(axes: TokenAxes, node: fx.Node) -> bool:
    """Whether it is [B, H, T, E], where T is the token axis and B its batch. A batch of size 1 needs no axis."""
    labels = axes.of(node)
    axis = axes.axis_at(labels[2]) if len(labels) == 4 else None
    if axis is None or labels[2] != axis.token or labels[0] != axis.batch:
        return False
    return bool(axis.batch) or same_size(node.meta["val"].shape[0], 1)


def _before_groups(node: fx.Node) -> Any:
    """Keys or values [B, Hkv, S, E] before they are repeated for groups of heads, or as they are."""
    view = node
    while view.target in COPIES:
        view = view.args[0]
    spread = view.args[0] if view.target in VIEWS else view
    while is_tensor(spread) and spread.target in COPIES:
        spread = spread.args[0]
    if spread.target is not aten.expand.default or spread.meta["val"].ndim != 5:
        return node
    group = spread.args[0]
    if group.target is not aten.unsqueeze.default or group.args[1] not in (2, -3):
        return node
    shape, heads = spread.meta["val"].shape, node.meta["val"].shape
    whole = (shape[0], shape[1] * shape[2], *shape[3:])
    return group.args[0] if all(map(same_size, whole, heads)) else node


def read_by(program: Program, node: fx.Node) -> Sequence[fx.Node]:
    """The nodes that an operation reads. Attention by position reads neither a mask of all pairs nor scores."""
    attention = program[PositionalAttentions].get(node)
    return node.all_input_nodes if attention is None else (attention.query, *attention.context)


def laid_out_as(example: Tensor, value: Tensor) -> Tensor:
    """``value`` with the memory layout of ``example``, with which the views that follow were traced."""
    order = order_in_memory(example)
    return value if order == order_in_memory(value) else copied_in_order(value, order)
