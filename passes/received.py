"""Attention received: for every token, the attention that it gets from all queries of its sequence (TokenSeek's I1).

    I1[b, j] = sum over heads h and queries i of softmax(Q K^T scale + mask)[b, h, i, j]

Queries that may look at nothing (rows of padding) count for nothing. ``received`` computes it for blocks of queries, so its
memory is that of one block, never a ``[B, H, T, T]`` tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .geometry import Geometry
from .rules.op import bind, bind_values
from .token_axes import SDPA, Attention

#: Additive masks are at most this where a key is hidden: finfo.min of any dtype, -inf, -1e9, -1e4 with scores added; no
#: position bias is that low.
HIDDEN = -9e3
_BLOCK_BYTES = 4 * 2**20


@torch.library.custom_op("tokenseek_fx::attention_received", mutates_args=())
def received(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Attention received by every key from all queries: [*leading, S] for query [*leading, L, E], key [*leading, S, E].

    Arguments as in ``scaled_dot_product_attention``; fewer key heads than query heads are shared by groups. Computed in
    float32 at least, for a block of queries at a time.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query.shape[-2], key.shape[-2]
    total = torch.zeros(*query.shape[:-2], keys, dtype=dtype, device=query.device)
    rows = max(1, _BLOCK_BYTES // max(1, total.numel() * dtype.itemsize))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        seen = min(stop, keys) if is_causal else keys
        part = None if mask is None else mask[..., start if mask.shape[-2] > 1 else 0 : stop, :seen]
        scores = _scores(query[..., start:stop, :].to(dtype), key[..., :seen, :].to(dtype), scale)
        if is_causal:
            later = torch.arange(seen, device=query.device) > torch.arange(start, stop, device=query.device)[:, None]
            scores = scores.masked_fill_(later, -torch.inf)
        if part is not None:
            scores = scores.masked_fill_(~part, -torch.inf) if part.dtype is torch.bool else scores.add_(part)
        total[..., :seen] += attention_of(scores).sum(-2)
    return total


@received.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:-2], key.shape[-2]), dtype=dtype)


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Q K^T scale, with the heads of the keys shared by groups of query heads."""
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    if query.ndim < 3 or query.shape[-3] == key.shape[-3]:
        return query @ key.transpose(-1, -2)
    grouped = query.unflatten(-3, (key.shape[-3], -1))
    return (grouped @ key.transpose(-1, -2).unsqueeze(-3)).flatten(-4, -3)


def attention_of(scores: Tensor) -> Tensor:
    """softmax(scores), 0 in rows where all is hidden."""
    return torch.softmax(scores, -1).masked_fill(_sees_nothing(scores), 0.0)


def _sees_nothing(scores: Tensor) -> Tensor:
    """The rows of ``scores`` in which all is hidden, [..., 1]."""
    return scores.amax(-1, keepdim=True) <= HIDDEN


def received_in(attention: Attention, values: Mapping[fx.Node, Any], geometry: Geometry) -> Tensor:
    """I1 of one attention, [B, T], from the seek stream's values."""
    node, axes = attention.node, geometry.axes
    if node.target is SDPA:
        given = bind_values(node, values)
        total = received(given["query"], given["key"], given["attn_mask"], given["is_causal"], given["scale"])
        labels = (*axes.of(node.args[0])[:-2], axes.of(node.args[1])[-2])
        return geometry.by_token(total, labels, len(labels) - 1)
    shares = values[attention.shares].masked_fill(_sees_nothing(values[node.args[0]]), 0.0)
    shares = shares.to(torch.promote_types(shares.dtype, torch.float32))
    labels = axes.of(attention.shares)
    return geometry.by_token(shares, labels, len(labels) - 1)


def attended_in(attention: Attention, values: Mapping[fx.Node, Any], geometry: Geometry) -> Tensor | None:
    """True for tokens that any query may look at (bool [B, T]), i.e. that are no padding; ``None``: all."""
    node, axes = attention.node, geometry.axes
    if node.target is not SDPA:
        seen = (values[attention.shares] > 0) & ~_sees_nothing(values[node.args[0]])
        labels = axes.of(attention.shares)
        return geometry.by_token(seen, labels, len(labels) - 1)
    mask = bind(node)["attn_mask"]
    if mask is None or axes.of(mask)[-1] != geometry.axis.token:
        return None
    visible = values[mask] if values[mask].dtype is torch.bool else values[mask] > HIDDEN
    return geometry.by_token(visible, axes.of(mask), len(axes.of(mask)) - 1)
