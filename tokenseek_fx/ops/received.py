"""Attention received: for each key, the sum of its attention weights over all queries (TokenSeek's I1).

    received[..., j] = sum over i of softmax_j(cap(Q K^T scale) + mask)[..., i, j],   cap(x) = softcap tanh(x / softcap)

Fully masked queries (padding) are left out of the sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .device import HALF, runs_triton
from .visibility import ALL_KEYS, Visibility, with_flat_visibility

#: Scores at most this low are masked: additive masks use finfo.min of any dtype, -inf, -1e9 or -1e4, to which scores
#: are added; no position bias is this low.
HIDDEN = -9e3
#: Bytes of scores in memory at a time.
BLOCK_BYTES = 4 * 2**20


def received(
    query: Tensor,
    key: Tensor,
    visibility: Visibility = ALL_KEYS,
    scale: float | None = None,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention received by each key from all queries, at least in float32, without a tensor of all pairs.

    Triton kernels compute it on a GPU if they support these tensors; else it is computed one block of queries at a
    time. Queries and keys are at positions 0, 1, 2 and so on.

    Args:
        query: [*leading, L, E].
        key: [*leading, S, E]; if it has fewer heads (the last leading dim), groups of query heads share one.
        visibility: which keys each query sees. The mask broadcasts to [*leading, L, S]. Segments need L = S; B is the
            first leading dim. ``fully_masked`` has no effect: such queries are left out of the sum.
        scale: factor of the scores; None: 1 / sqrt(E).
        softcap: cap of the scores before the mask; 0: none.
        lse: [*leading, L], the log-sum-exp of the scores over keys, after cap and masks; None: it is computed.

    Returns:
        [*leading of the query, S], in float32 or, for float64 inputs, float64.
    """
    form = (query, key, scale, softcap, lse, *visibility.without_means().flat())
    narrow = query.ndim == 4 and query.shape[-1] <= 256 and query.dtype in (*HALF, torch.float32)
    if narrow and runs_triton(query):
        from .received_triton import attention_received_triton

        return attention_received_triton(*form)
    return attention_received(*form)


@torch.library.custom_op("tokenseek_fx::attention_received", mutates_args=())
@with_flat_visibility
def attention_received(
    query: Tensor, key: Tensor, scale: float | None, softcap: float, lse: Tensor | None, visibility: Visibility
) -> Tensor:
    """``received`` in blocks of ATen operations."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query.shape[-2], key.shape[-2]
    total = torch.zeros(*query.shape[:-2], keys, dtype=dtype, device=query.device)
    rows = max(1, BLOCK_BYTES // max(1, total.numel() * dtype.itemsize))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        first, last = _reach(visibility, start, stop, keys)
        if first >= last:
            continue
        scores = _scores(query[..., start:stop, :].to(dtype), key[..., first:last, :].to(dtype), scale, softcap)
        ranges = ((start, stop), (first, last))
        visible = visibility.visible(*(torch.arange(*ends, device=query.device)[None] for ends in ranges))
        if visible is not None:
            scores = scores.masked_fill_(~_by_instance(visible, scores.ndim), -torch.inf)
        mask = visibility.mask
        if mask is not None:
            part = mask[..., start if mask.shape[-2] > 1 else 0 : stop, first if mask.shape[-1] > 1 else 0 : last]
            scores = scores.masked_fill_(~part, -torch.inf) if part.dtype is torch.bool else scores.add_(part)
        of_rows = lse if lse is None else lse[..., start:stop, None].to(dtype)
        total[..., first:last] += attention_of(scores, of_rows).sum(-2)
    return total


@attention_received.register_fake
def _(query: Tensor, key: Tensor, *how: Any, **options: Any) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:-2], key.shape[-2]), dtype=dtype)


@register_flop_formula(torch.ops.tokenseek_fx.attention_received)
def flops_of_received(query: Any, key: Any, *how: Any, out_shape: Any = None, **options: Any) -> int:
    """FLOPs: one product of queries and keys; masked scores count too, as in PyTorch's formula for attention."""
    return 2 * math.prod(query) * key[-2]


def _reach(visibility: Visibility, start: int, stop: int, keys: int) -> tuple[int, int]:
    """The range of keys that queries ``start`` to ``stop`` may see by position."""
    first, last = visibility.reach(start, stop - 1)
    return max(0, first or 0), keys if last is None else min(keys, last + 1)


def _by_instance(visible: Tensor, ndim: int) -> Tensor:
    """``visible`` [B or 1, q, n], as it broadcasts to scores [B, ..., q, n] of ``ndim`` dims."""
    return visible[0] if len(visible) == 1 else visible.reshape(len(visible), *(1,) * (ndim - 3), *visible.shape[1:])


def _scores(query: Tensor, key: Tensor, scale: float | None, softcap: float) -> Tensor:
    """cap(Q K^T scale); groups of query heads share the heads of the keys."""
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    if query.ndim < 3 or query.shape[-3] == key.shape[-3]:
        scores = query @ key.transpose(-1, -2)
    else:
        grouped = query.unflatten(-3, (key.shape[-3], -1))
        scores = (grouped @ key.transpose(-1, -2).unsqueeze(-3)).flatten(-4, -3)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def attention_of(scores: Tensor, lse: Tensor | None = None) -> Tensor:
    """softmax(scores), 0 in fully masked rows. ``lse``: [..., 1], the log-sum-exp. May overwrite ``scores``."""
    if lse is None:
        return torch.softmax(scores, -1).masked_fill(sees_nothing(scores), 0.0)
    return scores.sub_(lse).exp_().masked_fill_(lse <= HIDDEN, 0.0)


def sees_nothing(scores: Tensor, keys: int = -1) -> Tensor:
    """True for queries that are fully masked, with size 1 in the dim ``keys``."""
    return scores.amax(keys, keepdim=True) <= HIDDEN
