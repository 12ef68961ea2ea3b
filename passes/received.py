"""Attention received: for every token, the attention that it gets from all queries of its sequence (TokenSeek's I1).

    I1[b, j] = sum over heads h and queries i of softmax(Q K^T scale + mask)[b, h, i, j]

Queries that may look at nothing (rows of padding) count for nothing. The operator works in blocks, so no
``[B, H, T, T]`` tensor exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.received import HIDDEN, received, sees_nothing
from .attend import Attending
from .geometry import Geometry
from .rules.op import bind, bind_values
from .token_axes import SDPA, Attention


def received_in(
    attention: Attention, attending: Attending | None, values: Mapping[fx.Node, Any], geometry: Geometry
) -> Tensor:
    """I1 of one attention, [B, T], from the seek stream's values; by position where it is ``attending``."""
    node, axes = attention.node, geometry.axes
    if attending is not None:
        labels = (*axes.of(attending.query)[:-2], axes.of(attending.key)[-2])
        return geometry.by_token(attending.received(values), labels, len(labels) - 1)
    if node.target is SDPA:
        given = bind_values(node, values)
        total = received(given["query"], given["key"], given["attn_mask"], given["is_causal"], given["scale"])
        labels = (*axes.of(node.args[0])[:-2], axes.of(node.args[1])[-2])
        return geometry.by_token(total, labels, len(labels) - 1)
    shares = values[attention.shares].masked_fill(sees_nothing(values[node.args[0]]), 0.0)
    shares = shares.to(torch.promote_types(shares.dtype, torch.float32))
    labels = axes.of(attention.shares)
    return geometry.by_token(shares, labels, len(labels) - 1)


def attended_in(
    attention: Attention, attending: Attending | None, values: Mapping[fx.Node, Any], geometry: Geometry
) -> Tensor | None:
    """True for tokens that any query may look at (bool [B, T]), i.e. that are no padding; ``None``: all."""
    node, axes = attention.node, geometry.axes
    if attending is not None:
        return _attended_by_position(attending, values, geometry)
    if node.target is not SDPA:
        seen = (values[attention.shares] > 0) & ~sees_nothing(values[node.args[0]])
        labels = axes.of(attention.shares)
        return geometry.by_token(seen, labels, len(labels) - 1)
    mask = bind(node)["attn_mask"]
    if mask is None or axes.of(mask)[-1] != geometry.axis.token:
        return None
    visible = values[mask] if values[mask].dtype is torch.bool else values[mask] > HIDDEN
    return geometry.by_token(visible, axes.of(mask), len(axes.of(mask)) - 1)


def _attended_by_position(attending: Attending, values: Mapping[fx.Node, Any], geometry: Geometry) -> Tensor | None:
    """Every token may look at itself, so all but the keys that are hidden from all queries."""
    visible = attending.mask.visible(values)
    if visible is None:
        return None
    visible = visible if visible.dtype is torch.bool else visible > HIDDEN
    labels = geometry.axes.of(attending.key)
    shape = (values[attending.key].shape[0], *visible.shape[1:])
    return geometry.by_token(visible.expand(shape), (labels[0], (), (), labels[2]), 3)
