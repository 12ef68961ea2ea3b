"""Row rules of attention: the kept queries attend to all keys."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from torch import Tensor, fx

from ..attention.positional import PositionalAttention, PositionalAttentions
from ..rules.attention import AttentionOp, attention_op
from .row_op import RowOp
from .rules import rerun, restricts, rows_rule

aten = torch.ops.aten


def attention(call: RowOp) -> Any:
    """An attention operation: attention by position if it qualifies, else the same operation on the kept queries."""
    if not restricts(call):
        return NotImplemented
    if (found := by_position(call)) is not None:
        return _attend(call, found)
    given = attention_op(call.node)
    assert given is not None
    if call.dim != given.query.meta["val"].ndim - 2:  # tokens are a leading dim: attention runs within each token
        return rerun(call) if all(_carried(call, x) for x in (given.query, given.key, given.value)) else NotImplemented
    return NotImplemented if given.softcap or given.sinks is not None else _masked(call, given)


def _carried(call: RowOp, operand: fx.Node) -> bool:
    return call.carried(call.operands.index(operand)) is not None


def _masked(call: RowOp, given: AttentionOp) -> Tensor:
    """Attention of the kept queries to all keys; a causal flag becomes a mask by position."""
    place = call.operands.index
    mask = call.rows(place(given.mask)) if given.mask is not None else None
    if given.is_causal:
        mask = _causal_mask(call, given)
    query, key, value = call.rows(place(given.query)), call.context(place(given.key)), call.context(place(given.value))
    return aten.scaled_dot_product_attention.default(
        query, key, value, mask, dropout_p=given.dropout_p, scale=given.scale, enable_gqa=given.enable_gqa
    )


def _causal_mask(call: RowOp, given: AttentionOp) -> Tensor:
    """True where the position of a kept query is at or after that of a key: bool ``[..., row, key]``."""
    streams, query, key = call.streams, given.query, given.key
    labels, device = streams.axes.of(query), call.row_index.indices.device

    def compare() -> Tensor:
        position = torch.arange(call.row_index.tokens, device=device).unsqueeze(-1)
        like, whole = (*labels[:-1], ()), streams.seek[query]
        rows = streams.aligned_rows(position, (labels[-2], ()), 0, like, whole, len(labels))
        return rows >= torch.arange(streams.seek[key].shape[-2], device=device)

    return streams.once(("causal", streams.axes.of(key)[-2], *call.place_of_batch(query)), compare)


@rows_rule(aten.matmul.default)
def product(call: RowOp) -> Any:
    """The product of attention weights and values: attention by position if it qualifies."""
    found = by_position(call)
    return rerun(call) if found is None else _attend(call, found)


def by_position(call: RowOp) -> PositionalAttention | None:
    """The attention by position of this result; ``None`` if there is none, or if keys of all tokens are live."""
    found = call.streams.program[PositionalAttentions].get(call.node)
    if found is None or any(map(call.streams.keeps_live, (found.key, found.value))):
        return None
    return found


def _attend(call: RowOp, found: PositionalAttention) -> Tensor:
    streams = call.streams
    sinks = {} if found.sinks is None else {found.sinks: streams.full(found.sinks)}
    values = ChainMap(sinks, streams.looked_at)
    return found(
        values, streams.rows(found.query, 2), call.row_index.indices, streams.kept_keys(found.key, found.value)
    )
