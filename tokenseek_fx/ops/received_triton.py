"""Attention received on a GPU: two Triton kernels that never store scores.

The first goes over the keys for a block of queries and computes the log-sum-exp of each query. The second goes over the
queries for a block of keys and sums exp(score - log-sum-exp) in a fixed order, so results are deterministic. The ATen
implementation in ``received.py`` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula

from ..compat import wrap_kernel
from .received import HIDDEN, flops_of_received
from .static import NUMBER, Variant
from .visibility import Visibility, with_flat_visibility

WARPS = 8


@triton.jit
def _block_of_scores(
    q, k, i, j, queries, keys, scale, softcap,
    mask, mask_i, mask_j, segments, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores [queries i, keys j], -inf if masked. q: [i, E]; k: [E, j]; ``mask``, ``segments``: at this b and h."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    seen = (i[:, None] < queries) & (j[None, :] < keys)
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    if WINDOW:
        seen = seen & (j[None, :] > i[:, None] - window) & (j[None, :] < i[:, None] + window)
    if SEGMENTS:
        own = tl.load(segments + i, mask=i < queries, other=0)
        theirs = tl.load(segments + j, mask=j < keys, other=0)
        seen = seen & (own[:, None] == theirs[None, :])
    if MASK == 1:
        shown = tl.load(mask + i[:, None] * mask_i + j[None, :] * mask_j, mask=seen, other=0)
        seen = seen & (shown != 0)
    if MASK == 2:
        scores += tl.load(mask + i[:, None] * mask_i + j[None, :] * mask_j, mask=seen, other=0).to(tl.float32)
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def _instance(heads):
    """(number of the program's instance and head, instance, head)."""
    at = tl.program_id(1)
    return at, (at // heads).to(tl.int64), (at % heads).to(tl.int64)


@triton.jit
def lse_kernel(
    query, key, mask, segments, lse,
    q_b, q_h, q_i, q_e, k_b, k_h, k_j, k_e, mask_b, mask_h, mask_i, mask_j,
    heads, group, queries, keys, scale, softcap, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """lse[b, h, i] = log sum over j of exp(score[b, h, i, j])."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    at, b, h = _instance(heads)  # pyright: ignore[reportGeneralTypeIssues]
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    e = tl.arange(0, BLOCK_E)
    query += b * q_b + h * q_h
    key += b * k_b + (h // group) * k_h
    mask += b * mask_b + h * mask_h
    segments += b * keys
    q = tl.load(query + i[:, None] * q_i + e[None, :] * q_e, mask=(i[:, None] < queries) & (e[None, :] < E), other=0)
    top = tl.full([BLOCK_I], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    first, last = 0, keys
    if WINDOW:
        first = tl.maximum(0, tl.program_id(0) * BLOCK_I - window + 1) // BLOCK_J * BLOCK_J
        last = tl.minimum(last, (tl.program_id(0) + 1) * BLOCK_I + window)
    if CAUSAL:
        last = tl.minimum(last, (tl.program_id(0) + 1) * BLOCK_I)
    for start in range(first, last, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        k = tl.load(key + j[None, :] * k_j + e[:, None] * k_e, mask=(j[None, :] < keys) & (e[:, None] < E), other=0)
        scores = _block_of_scores(
            q, k, i, j, queries, keys, scale, softcap, mask, mask_i, mask_j, segments, window,
            CAUSAL, WINDOW, SEGMENTS, SOFTCAP, MASK,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        top = higher
    tl.store(lse + at.to(tl.int64) * queries + i, top + tl.log(total), mask=i < queries)


@triton.jit
def received_kernel(
    query, key, mask, segments, lse, out,
    q_b, q_h, q_i, q_e, k_b, k_h, k_j, k_e, mask_b, mask_h, mask_i, mask_j,
    heads, group, queries, keys, scale, softcap, window, hidden,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """out[b, h, j] = sum over i of exp(score[b, h, i, j] - lse[b, h, i]), over queries with lse > ``hidden``."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    at, b, h = _instance(heads)  # pyright: ignore[reportGeneralTypeIssues]
    lse += at.to(tl.int64) * queries
    j, e = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_E)
    query += b * q_b + h * q_h
    key += b * k_b + (h // group) * k_h
    mask += b * mask_b + h * mask_h
    segments += b * keys
    k = tl.load(key + j[None, :] * k_j + e[:, None] * k_e, mask=(j[None, :] < keys) & (e[:, None] < E), other=0)
    total = tl.zeros([BLOCK_J], tl.float32)
    first, last = 0, queries
    if WINDOW:
        first = tl.maximum(0, tl.program_id(0) * BLOCK_J - window + 1) // BLOCK_I * BLOCK_I
        last = tl.minimum(last, (tl.program_id(0) + 1) * BLOCK_J + window)
    if CAUSAL:
        first = tl.maximum(first, tl.program_id(0) * BLOCK_J // BLOCK_I * BLOCK_I)
    for start in range(first, last, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        q = tl.load(
            query + i[:, None] * q_i + e[None, :] * q_e, mask=(i[:, None] < queries) & (e[None, :] < E), other=0
        )
        scores = _block_of_scores(
            q, k, i, j, queries, keys, scale, softcap, mask, mask_i, mask_j, segments, window,
            CAUSAL, WINDOW, SEGMENTS, SOFTCAP, MASK,
        )  # fmt: skip
        of_rows = tl.load(lse + i, mask=i < queries, other=-float("inf"))
        dead = of_rows <= hidden
        shares = tl.exp(scores - tl.where(dead, 0.0, of_rows)[:, None])
        total += tl.sum(tl.where(dead[:, None], 0.0, shares), 0)
    tl.store(out + at.to(tl.int64) * keys + j, total, mask=j < keys)


@triton_op("tokenseek_fx::attention_received_triton", mutates_args=())
@with_flat_visibility
def attention_received_triton(
    query: Tensor, key: Tensor, scale: float | None, softcap: float, lse: Tensor | None, visibility: Visibility
) -> Tensor:
    """``received`` of query [B, H, L, E] and key [B, G, S, E], as float32 [B, H, S].

    E is at most 256; dtypes have at most 32 bits.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    out = query.new_empty((batch, heads, keys), dtype=torch.float32)
    mask, numbers = visibility.kernel_tensors(query)
    strides = visibility.mask_strides(query, key)
    scale = width**-0.5 if scale is None else scale
    sizes = (heads, heads // key.shape[1], queries, keys, scale, softcap, visibility.window)
    options = {
        **blocks(width, query.dtype, visibility.mask is None and visibility.segments is None),
        **visibility.constants(),
        "SOFTCAP": softcap != 0,
        "num_warps": WARPS,
    }
    where = (*query.stride(), *key.stride(), *strides)
    if lse is None:
        lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
        grid = (triton.cdiv(queries, options["BLOCK_I"]), batch * heads)
        wrap_kernel(lse_kernel)[grid](query, key, mask, numbers, lse, *where, *sizes, **options)
    else:
        lse = lse.to(torch.float32).contiguous()
    grid = (triton.cdiv(keys, options["BLOCK_J"]), batch * heads)
    wrap_kernel(received_kernel)[grid](query, key, mask, numbers, lse, out, *where, *sizes, HIDDEN, **options)
    return out


register_flop_formula(torch.ops.tokenseek_fx.attention_received_triton)(flops_of_received)


def blocks(width: int, dtype: torch.dtype, plain: bool) -> dict[str, int]:
    """Block sizes for heads of ``width`` features. ``plain``: without mask and segments, whose loads need registers."""
    side = 64 if plain and width <= 128 and dtype.itemsize == 2 else 32
    return {"E": width, "BLOCK_E": max(16, 1 << (width - 1).bit_length()), "BLOCK_I": side, "BLOCK_J": side}


def variants() -> list[Variant]:
    """Both kernels for all head widths: causal in half precision, and with all features in half and float32."""
    plain = {"CAUSAL": True, "WINDOW": False, "SEGMENTS": False, "SOFTCAP": False, "MASK": 0}
    full = {"CAUSAL": True, "WINDOW": True, "SEGMENTS": True, "SOFTCAP": True, "MASK": 2}
    half = [("bf16", width, plain, "causal") for width in (32, 64, 96, 128, 256)]
    wide = [(dtype, width, full, "everything") for dtype in ("bf16", "fp32") for width in (64, 128, 256)]
    cases = [*half, *wide]
    return [_variant(kernel, *case) for kernel in (lse_kernel, received_kernel) for case in cases]


def _variant(kernel: triton.JITFunction, dtype: str, width: int, how: dict, label: str) -> Variant:
    sizes = blocks(width, torch.float32 if dtype == "fp32" else torch.bfloat16, not how["MASK"])
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("query", "key", "mask"), f"*{dtype}") | dict.fromkeys(("lse", "out"), "*fp32")
    types |= {"segments": "*i64"} | dict.fromkeys(("scale", "softcap", "hidden"), NUMBER)
    constants = {**sizes, **how, "q_e": 1, "k_e": 1, "mask_j": 1}
    aligned = ("q_b", "q_h", "q_i", "k_b", "k_h", "k_j", "mask_b", "mask_h", "mask_i")
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    return Variant(f"{dtype}, heads of {width}, {label}", kernel, signature, constants, WARPS, aligned=aligned)
