"""Attention received: for each token, the attention from all queries of its sequence (TokenSeek's I1).

    I1[b, j] = sum over heads h and queries i of softmax(Q K^T scale + mask)[b, h, i, j]

Fully masked queries (padding) are left out of the sum. The operator works in blocks, so no ``[B, H, T, T]`` tensor
exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...ops.received import HIDDEN, received, sees_nothing
from ...ops.visibility import Visibility
from ..analysis.attentions import Attention
from ..analysis.row_index import RowIndex
from ..graph.errors import GraphNotSupported
from ..rules.attention import attention_op
from .positional import PositionalAttention


def received_in(
    attention: Attention, positional: PositionalAttention | None, values: Mapping[fx.Node, Any], row_index: RowIndex
) -> Tensor:
    """I1 of one attention, [B, T], from the values of the seek stream."""
    node, axes = attention.node, row_index.axes
    if positional is not None:
        labels = (*axes.of(positional.query)[:-2], axes.of(positional.key)[-2])
        return row_index.by_token(positional.received(values), labels, len(labels) - 1)
    given = attention_op(node)
    if given is not None:
        if given.sinks is not None:
            raise GraphNotSupported(
                "An attention with sinks can't mask by position, so the attention that its tokens receive is unknown.",
                'Choose scorer="loss" or scorer="random".',
                node,
            )
        mask = None if given.mask is None else values[given.mask]
        visibility = Visibility(mask=mask, causal=given.is_causal)
        total = received(values[given.query], values[given.key], visibility, given.scale, given.softcap)
        labels = (*axes.of(given.query)[:-2], axes.of(given.key)[-2])
        return row_index.by_token(total, labels, len(labels) - 1)
    weights = values[attention.weights].masked_fill(_fully_masked(attention, values), 0.0)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return row_index.by_token(weights, axes.of(attention.weights), attention.dims[1])


def _fully_masked(attention: Attention, values: Mapping[fx.Node, Any]) -> Tensor:
    """True for the queries of an eager attention that see no key; its weights may then be 0 / 0."""
    if attention.scores is None:
        return values[attention.weights].isnan()
    return sees_nothing(values[attention.scores], attention.dims[1])


def attended_in(
    attention: Attention, positional: PositionalAttention | None, values: Mapping[fx.Node, Any], row_index: RowIndex
) -> Tensor | None:
    """True for tokens that any query sees, which are not padding, bool [B, T]; None: all."""
    node, axes = attention.node, row_index.axes
    if positional is not None:
        return _attended_by_position(positional, values, row_index)
    given = attention_op(node)
    if given is None:
        seen = (values[attention.weights] > 0) & ~_fully_masked(attention, values)
        return row_index.by_token(seen, axes.of(attention.weights), attention.dims[1])
    mask = given.mask
    if mask is None or axes.of(mask)[-1] != row_index.axis.token:
        return None
    visible = values[mask] if values[mask].dtype is torch.bool else values[mask] > HIDDEN
    return row_index.by_token(visible, axes.of(mask), len(axes.of(mask)) - 1)


def _attended_by_position(
    positional: PositionalAttention, values: Mapping[fx.Node, Any], row_index: RowIndex
) -> Tensor | None:
    """Each token sees itself unless it is hidden from all queries."""
    visible = positional.mask.key_mask(values)
    if visible is None:
        return None
    visible = visible if visible.dtype is torch.bool else visible > HIDDEN
    labels = row_index.axes.of(positional.key)
    shape = (values[positional.key].shape[0], *visible.shape[1:])
    return row_index.by_token(visible.expand(shape), (labels[0], (), (), labels[2]), 3)
