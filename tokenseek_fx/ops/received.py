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

#: Scores at most this low are masked: additive masks use finfo.min of any dtype, -inf, -1e9 or -1e4, to which scores
#: are added; no position bias is this low.
HIDDEN = -9e3
#: Bytes of scores in memory at a time.
BLOCK_BYTES = 4 * 2**20


def received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None = None,
    segments: Tensor | None = None,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """``attention_received``, by Triton kernels on a GPU if they support these tensors."""
    narrow = query.ndim == 4 and query.shape[-1] <= 256 and query.dtype in (*HALF, torch.float32)
    if narrow and runs_triton(query):
        from .received_triton import attention_received_triton

        return attention_received_triton(query, key, mask, is_causal, scale, window, segments, softcap, lse)
    return attention_received(query, key, mask, is_causal, scale, window, segments, softcap, lse)


@torch.library.custom_op("tokenseek_fx::attention_received", mutates_args=())
def attention_received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | None = None,
    segments: Tensor | None = None,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention received by each key from all queries, computed in float32 or float64, one block of queries at a time.

    Args:
        query: [*leading, L, E].
        key: [*leading, S, E]; if it has fewer heads (the last leading dim), groups of query heads share one.
        mask: bool (False: masked) or additive, broadcast to [*leading, L, S].
        is_causal: query i sees only keys j <= i.
        scale: factor of the scores; ``None``: 1 / sqrt(E).
        window: query i sees only keys i - window < j < i + window; ``None``: no window.
        segments: [B, S] integers, B the first leading dim; query i sees only keys of its own segment. Needs L = S.
        softcap: cap of the scores before the mask; 0: none.
        lse: [*leading, L], the log-sum-exp of the scores over keys, after cap and masks; ``None``: it is computed.

    Returns:
        [*leading of the query, S], in float32 or, for float64 inputs, float64.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query.shape[-2], key.shape[-2]
    total = torch.zeros(*query.shape[:-2], keys, dtype=dtype, device=query.device)
    rows = max(1, BLOCK_BYTES // max(1, total.numel() * dtype.itemsize))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        first, last = _seen(start, stop, keys, is_causal, window)
        if first >= last:
            continue
        scores = _scores(query[..., start:stop, :].to(dtype), key[..., first:last, :].to(dtype), scale, softcap)
        hidden = _hidden(start, stop, first, last, is_causal, window, segments, scores)
        scores = scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)
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


def _seen(start: int, stop: int, keys: int, is_causal: bool, window: int | None) -> tuple[int, int]:
    """The range of keys that queries ``start`` to ``stop`` may see by position."""
    first = 0 if window is None else max(0, start - window + 1)
    if is_causal:
        return first, min(stop, keys)
    return first, keys if window is None else min(keys, stop + window - 1)


def _hidden(
    start: int, stop: int, first: int, last: int, is_causal: bool, window: int | None, segments: Any, like: Tensor
) -> Tensor | None:
    """True if a query of a block doesn't see a key of a range, by position or segment; None if all are visible."""
    ahead = torch.arange(first, last, device=like.device) - torch.arange(start, stop, device=like.device)[:, None]
    hidden = ahead > 0 if is_causal else None
    if window is not None:
        outside = ahead.abs() >= window
        hidden = outside if hidden is None else hidden | outside
    if segments is not None:
        other = segments[:, start:stop, None] != segments[:, None, first:last]
        other = other.reshape(len(segments), *(1,) * (like.ndim - 3), *other.shape[1:])
        hidden = other if hidden is None else hidden | other
    return hidden


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


def sees_nothing(scores: Tensor) -> Tensor:
    """True for fully masked rows of ``scores``, [..., 1]."""
    return scores.amax(-1, keepdim=True) <= HIDDEN
