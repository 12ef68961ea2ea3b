"""PositionalAttention: which attentions can look at keys and values as they are, by position.

Such an attention becomes ``ops.attention.selected_attention``: keys and values are not repeated for groups of heads, the rows
are not put into them, and neither masks nor scores have a dim for the queries. Asked for is what nearly all models have:
``scaled_dot_product_attention``, or products and a softmax in its place (``open_attention``), of [B, H, T, E], tokens as a dim of their
own, without dropout of the shares, and with a mask that compares positions (``masks``).
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
from ..analysis.token_axes import Attention, TokenAxes
from ..graph.factors import same_size
from ..graph.nodes import is_tensor
from ..graph.op_sets import COPIES, VIEWS
from ..graph.program import Program
from ..graph.strides import copied_in_order, order_in_memory
from ..rules.attention import AttentionOp, attention_op
from .eager import read_scores
from .mask_reader import read_mask
from .masks import Hides, Mask

aten = torch.ops.aten


@dataclass(frozen=True)
class PositionalAttention:
    """One attention: the nodes of its query [B, H, T, E], and of its key and value [B, Hkv, S, E] before heads are repeated."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: Mask
    scale: float | None
    dtype: torch.dtype  # of the products: under autocast not that of the operands
    softcap: float = 0.0
    sinks: fx.Node | None = None

    @property
    def by_position(self) -> bool:
        """True where it matters where the queries stand."""
        return self.mask.causal or bool(self.mask.window) or bool(self.mask.segments)

    @property
    def context(self) -> tuple[fx.Node, ...]:
        """What the queries look at as a whole."""
        parts = [node for node, _ in (*self.mask.keys, *self.mask.segments)]
        return (self.key, self.value, *parts, *(x for x in (self.mask.added, self.sinks) if x is not None))

    def __call__(
        self, values: Mapping[fx.Node, Any], query: Tensor, positions: Tensor, live: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """The attention of ``query`` [B, H, k, E] at ``positions`` [B, k] to the keys of ``values``; ``live``: selected rows of
        key and value and their places, which get the gradient."""
        out, _ = self._attend(values, query, positions, live)
        return out

    def _attend(
        self, values: Mapping[fx.Node, Any], query: Tensor, positions: Tensor, live: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """The attention, and the log-sum-exp of the scores."""
        row_key, row_value, columns = live or (None, None, None)
        operands = (query, row_key, row_value, values[self.key], values[self.value])
        return selected_attention(
            *map(self._cast, operands),
            positions if self.by_position else None,
            columns=columns,
            mask=self.mask.visible(values),
            segments=self.mask.segments_of(values),
            causal=self.mask.causal,
            window=self.mask.window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=None if self.sinks is None else values[self.sinks].flatten(),
            fully_masked=self.mask.fully_masked(values, positions) if self.sinks is None else None,  # sinks get it all
            scored=self.mask.hides is Hides.BY_SUM,
            return_lse=True,
        )

    def _cast(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype is self.dtype else x.to(self.dtype)

    def of_all_tokens(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """That of all tokens, all of their keys and values with gradient."""
        query, key, value = (values[node] for node in (self.query, self.key, self.value))
        rows, columns = (torch.arange(x.shape[2], device=x.device).expand(x.shape[0], -1) for x in (query, key))
        return self(values, query, rows, (key, value, columns))

    def received(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """The attention that every key gets from all queries, [B, H, S]."""
        query, mask = values[self.query], self.mask
        segments, lse = mask.segments_of(values), None
        if self.sinks is not None:
            positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
            _, lse = self._attend(values, query, positions, None)
        return received(
            self._cast(query),
            self._cast(values[self.key]),
            mask.visible(values),
            mask.causal,
            self.scale,
            mask.window or None,
            None if segments is None else segments.expand(query.shape[0], -1),
            self.softcap,
            lse,
        )


class PositionalAttentions(dict[fx.Node, PositionalAttention]):
    """The attentions that qualify, by their results."""


@dataclass(frozen=True)
class FindPositionalAttention:
    """Read every attention. Reads ``TokenAxes``, ``Activity``; writes ``PositionalAttentions``."""

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
        """Nothing to verify: an attention that does not qualify is executed as it is."""


def _read(program: Program, node: fx.Node, given: AttentionOp, mask: Mask | None) -> PositionalAttention | None:
    """An attention operation."""
    if mask is None or given.dropout_p or not is_tensor(node):
        return None
    if given.is_causal:
        mask = replace(mask, causal=True)
    form = (mask, given.scale, node.meta["val"].dtype, given.softcap, given.sinks)
    found = PositionalAttention(given.query, given.key, given.value, *form)
    return _qualified(program, found, is_repeated=not given.enable_gqa)


def _read_eager(program: Program, attention: Attention) -> PositionalAttention | None:
    """One that the model writes out."""
    found, out = read_scores(attention), attention.out
    if found is None:
        return None
    form = (found.mask, found.scale, out.meta["val"].dtype, found.softcap, found.sinks)
    return _qualified(program, PositionalAttention(found.query, found.key, out.args[1], *form), is_repeated=True)


def _qualified(program: Program, attention: PositionalAttention, is_repeated: bool) -> PositionalAttention | None:
    """``attention`` with key and value as they are before heads are repeated, where tokens are a dim of their own and the mask is not
    trained."""
    axes, (query, key, value) = program[TokenAxes], (attention.query, attention.key, attention.value)
    if attention.mask.added in program[Activity].live or not all(_is_by_token(axes, x) for x in (query, key, value)):
        return None
    key, value = map(_before_groups, (key, value)) if is_repeated else (key, value)
    heads, groups = query.meta["val"].shape[1], key.meta["val"].shape[1]
    if not same_size(groups, value.meta["val"].shape[1]) or not isinstance(heads, int) or heads % groups:
        return None
    return replace(attention, key=key, value=value)


def _is_by_token(axes: TokenAxes, node: fx.Node) -> bool:
    """[B, H, T, E], where B are the instances and T their tokens; a single instance has no axis."""
    labels = axes.of(node)
    axis = axes.axis_at(labels[2]) if len(labels) == 4 else None
    if axis is None or labels[2] != axis.token or labels[0] != axis.batch:
        return False
    return bool(axis.batch) or same_size(node.meta["val"].shape[0], 1)


def _before_groups(node: fx.Node) -> Any:
    """Keys or values [B, Hkv, S, E] that are repeated for groups of heads: before that, else as they are."""
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
    """What an operation reads; attention by position reads neither a mask of all pairs nor scores."""
    attention = program[PositionalAttentions].get(node)
    return node.all_input_nodes if attention is None else (attention.query, *attention.context)


def laid_out_as(example: Tensor, value: Tensor) -> Tensor:
    """``value`` with its dims in the order in memory of ``example``: views that follow were traced with that."""
    order = order_in_memory(example)
    return value if order == order_in_memory(value) else copied_in_order(value, order)
