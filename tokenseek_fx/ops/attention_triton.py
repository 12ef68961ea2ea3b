"""Selected attention on a GPU: three Triton kernels, after FlashAttention-2 (Dao, 2023, arXiv 2307.08691).

All query heads of a key head share one dim of ``rows x group`` (row i, head g at i group + g). A key is read once for
all of them, and a block covers few rows and positions, so that it skips blocks of keys after its last row and before
its window. Keys that all rows of a block see come first, without comparisons. Gradients are summed in a fixed order,
without atomics: dq in blocks of rows over all keys, dk and dv in blocks of ``columns`` over the rows.
``attention.definition`` is the definition.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ..compat import wrap_kernel
from .attention import register
from .attention_blocks import lse_like, rows_like
from .fully_masked import fill
from .static import NUMBER, Variant
from .visibility import Visibility, with_flat_visibility

#: log2(e) and its inverse: the softmax uses powers of 2.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Lower bound of finite mask values: finfo.min times log2(e) would be -inf.
LEAST = tl.constexpr(-2e38)


@triton.jit
def _capped(scores, softcap):
    """tanh(scores / softcap)."""
    return 2 * tl.sigmoid(2 * scores / softcap) - 1


@triton.jit
def _hidden(
    scores, p, j, inside, own, theirs, window, keys, mask, mask_rows, mask_j,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """``scores`` (times log2(e)) with masks: -inf if the row at position ``p`` doesn't see key ``j``.

    ``p`` and ``j`` broadcast to ``scores``.
    """
    seen = j < keys
    if BY_ROW:
        here = mask + mask_rows + j.to(tl.int64) * mask_j
        loaded = seen & inside
    else:
        here = mask + j.to(tl.int64) * mask_j
        loaded = seen
    if MASK == 1:
        shown = tl.load(here, mask=loaded, other=0)
        seen = seen & (shown != 0)
    if MASK == 2:
        added = tl.load(here, mask=loaded, other=0).to(tl.float32)
        scores += tl.where(added == -float("inf"), added, tl.maximum(added, LEAST) * LOG2E)
    if CAUSAL:
        seen = seen & (j <= p)
    if WINDOW:
        seen = seen & (p - j < window)
        if not CAUSAL:
            seen = seen & (j - p < window)
    if SEGMENTS:
        seen = seen & (own == theirs)
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def _reach(
    positions, first, last, keys, window, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The keys of rows ``first`` .. ``last``: (start, end of the keys that all these rows see, end)."""
    start, stop = 0, keys
    if CAUSAL:
        stop = tl.minimum(keys, tl.load(positions + last).to(tl.int32) + 1)
    if WINDOW:
        start = tl.maximum(0, tl.load(positions + first).to(tl.int32) - window + 1) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            stop = tl.minimum(keys, tl.load(positions + last).to(tl.int32) + window)
    open_until = start
    if not (WINDOW or SEGMENTS or MASK):
        open_until = keys // BLOCK_N * BLOCK_N
        if CAUSAL:
            open_until = tl.minimum(keys, tl.load(positions + first).to(tl.int32) + 1) // BLOCK_N * BLOCK_N
    return start, open_until, stop


@triton.jit
def _matrix(base, at, stride, inside, BLOCK: tl.constexpr, WIDTH: tl.constexpr, HIDE: tl.constexpr):
    """Load rows ``at`` of a matrix, [at, BLOCK], 0 outside."""
    e = tl.arange(0, BLOCK)
    here = base + at[:, None] * stride + e[None, :]
    if WIDTH == BLOCK:
        if HIDE:
            return tl.load(here, mask=inside[:, None], other=0)
        return tl.load(here)
    if HIDE:
        return tl.load(here, mask=inside[:, None] & (e[None, :] < WIDTH), other=0)
    return tl.load(here, mask=e[None, :] < WIDTH, other=0)


@triton.jit
def _hide(
    scores, p, j, inside, own, segments, window, keys, mask, mask_rows, mask_j,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """``_hidden`` of scores [rows, keys]."""
    theirs = tl.load(segments + j, mask=j < keys, other=0) if SEGMENTS else j
    return _hidden(
        scores, p[:, None], j[None, :], inside[:, None], own[:, None], theirs[None, :], window, keys,
        mask, mask_rows[:, None], mask_j, CAUSAL, WINDOW, SEGMENTS, MASK, BY_ROW,
    )  # fmt: skip


@triton.jit
def _scores(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """(scores in units of log 2, the tanh in them where there is a soft cap)."""
    scores = tl.dot(a, b, input_precision="ieee")
    if SOFTCAP:
        capped = _capped(scores * scale, softcap)
        return capped * (softcap * LOG2E), capped
    return scores * (scale * LOG2E), scores


@triton.jit
def _forward_over(
    acc, top, total, q, start, stop, key, value, k_j, v_j, p, inside, own, segments, mask, mask_rows, mask_j,
    keys, window, scale, softcap, BLOCK_N: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, HIDE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
    BY_ROW: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys ``start`` .. ``stop``."""
    for block in range(start, stop, BLOCK_N):
        n, j, at = tl.arange(0, BLOCK_N), block + tl.arange(0, BLOCK_N), tl.cast(block, tl.int64)
        k = _matrix(key + at * k_j, n, k_j, j < keys, BLOCK_E, E, HIDE)
        scores, _ = _scores(q, tl.trans(k), scale, softcap, SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
        if HIDE:
            scores = _hide(
                scores, p, j, inside, own, segments, window, keys, mask, mask_rows, mask_j,
                CAUSAL, WINDOW, SEGMENTS, MASK, BY_ROW,
            )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher) if HIDE else higher
        shares = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(shares, 1)
        v = _matrix(value + at * v_j, n, v_j, j < keys, BLOCK_V, V, HIDE)
        acc = tl.dot(shares.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit
def _rows(m, rows, GROUP: tl.constexpr):
    """(row, head within the group, whether the row exists)."""
    i = m // GROUP
    return i, m % GROUP, i < rows


@triton.jit
def _row_block(key_heads, rows, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """(first of the program's BLOCK_M rows, instance, key head, *_rows of them); rows with most keys start first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, h = (tl.program_id(1) // key_heads).to(tl.int64), (tl.program_id(1) % key_heads).to(tl.int64)
    i, g, inside = _rows(first + tl.arange(0, BLOCK_M), rows, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    return first, b, h, i, g, inside


@triton.jit
def _positions(positions, i, inside, KNOWN: tl.constexpr):
    """The positions of rows. Not part of ``_rows``: ``positions`` would seem to be written to, and would be copied."""
    return tl.load(positions + i, mask=inside, other=0).to(tl.int32) if KNOWN else i


@triton.jit
def forward_kernel(
    query, key, value, positions, mask, segments, sinks, out, lse,
    q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j, o_b, o_h, o_i, mask_b, mask_h, mask_i, mask_j,
    key_heads, rows, keys, window, scale, softcap,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BLOCK_M rows of one instance and key head; rows with the most keys start first."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    first, b, h, i, g, inside = _row_block(key_heads, rows, BLOCK_M, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    positions += b * rows
    segments += b * keys
    p = _positions(positions, i, inside, CAUSAL or WINDOW or SEGMENTS)
    own = tl.load(segments + p, mask=inside, other=0) if SEGMENTS else i
    head = h * GROUP + g
    q = _matrix(query + b * q_b, head * q_h + i * q_i, 1, inside, BLOCK_E, E, True)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    last = tl.minimum((first + BLOCK_M - 1) // GROUP, rows - 1)
    start, open_until, stop = _reach(
        positions, first // GROUP, last, keys, window, BLOCK_N, CAUSAL, WINDOW, SEGMENTS, MASK
    )
    key += b * k_b + h * k_h
    value += b * v_b + h * v_h
    mask += b * mask_b
    mask_rows = head * mask_h + i * mask_i
    acc, top, total = _forward_over(
        acc, top, total, q, start, open_until, key, value, k_j, v_j, p, inside, own, segments, mask, mask_rows, mask_j,
        keys, window, scale, softcap, BLOCK_N, E, BLOCK_E, V, BLOCK_V, False,
        CAUSAL, WINDOW, SEGMENTS, SOFTCAP, MASK, BY_ROW,
    )  # fmt: skip
    acc, top, total = _forward_over(
        acc, top, total, q, open_until, stop, key, value, k_j, v_j, p, inside, own, segments, mask, mask_rows, mask_j,
        keys, window, scale, softcap, BLOCK_N, E, BLOCK_E, V, BLOCK_V, True,
        CAUSAL, WINDOW, SEGMENTS, SOFTCAP, MASK, BY_ROW,
    )  # fmt: skip
    sees = total > 0
    acc = acc * tl.where(sees, 1 / tl.where(sees, total, 1.0), 0.0)[:, None]
    v = tl.arange(0, BLOCK_V)
    there = out + b * o_b + (head * o_h + i * o_i)[:, None] + v[None, :]
    tl.store(there, acc.to(out.dtype.element_ty), mask=inside[:, None] & (v[None, :] < V))
    logs = tl.where(sees, (top + tl.log2(tl.where(sees, total, 1.0))) * LN2, 0.0)
    tl.store(lse + (b * key_heads * GROUP + head) * rows + i, logs, mask=inside)


@triton.jit
def _grad_query_over(
    acc, q, grad, lse, delta, start, stop, key, value, k_j, v_j, p, inside, own, segments, mask, mask_rows, mask_j,
    keys, window, scale, softcap,
    BLOCK_N: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    HIDE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """dq / scale over the keys ``start`` .. ``stop``."""
    for block in range(start, stop, BLOCK_N):
        n, j, at = tl.arange(0, BLOCK_N), block + tl.arange(0, BLOCK_N), tl.cast(block, tl.int64)
        k = _matrix(key + at * k_j, n, k_j, j < keys, BLOCK_E, E, HIDE)
        scores, capped = _scores(q, tl.trans(k), scale, softcap, SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
        if HIDE:
            scores = _hide(
                scores, p, j, inside, own, segments, window, keys, mask, mask_rows, mask_j,
                CAUSAL, WINDOW, SEGMENTS, MASK, BY_ROW,
            )  # fmt: skip
        shares = tl.exp2(scores - lse[:, None])
        v = _matrix(value + at * v_j, n, v_j, j < keys, BLOCK_V, V, HIDE)
        grad_scores = shares * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        if SOFTCAP:
            grad_scores *= 1 - capped * capped
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit
def grad_query_kernel(
    grad, delta, lse, query, key, value, positions, mask, segments, out,
    g_b, g_h, g_i, q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j, o_b, o_h, o_i, mask_b, mask_h, mask_i, mask_j,
    key_heads, rows, keys, window, scale, softcap,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M rows of one instance and key head, over all keys."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    first, b, h, i, g, inside = _row_block(key_heads, rows, BLOCK_M, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    positions += b * rows
    segments += b * keys
    p = _positions(positions, i, inside, CAUSAL or WINDOW or SEGMENTS)
    own = tl.load(segments + p, mask=inside, other=0) if SEGMENTS else i
    head = h * GROUP + g
    q = _matrix(query + b * q_b, head * q_h + i * q_i, 1, inside, BLOCK_E, E, True)
    do = _matrix(grad + b * g_b, head * g_h + i * g_i, 1, inside, BLOCK_V, V, True)
    at = (b * key_heads * GROUP + head) * rows + i
    logs = tl.load(lse + at, mask=inside, other=float("inf")) * LOG2E
    given = tl.load(delta + at, mask=inside, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    last = tl.minimum((first + BLOCK_M - 1) // GROUP, rows - 1)
    start, open_until, stop = _reach(
        positions, first // GROUP, last, keys, window, BLOCK_N, CAUSAL, WINDOW, SEGMENTS, MASK
    )
    key += b * k_b + h * k_h
    value += b * v_b + h * v_h
    mask += b * mask_b
    mask_rows = head * mask_h + i * mask_i
    acc = _grad_query_over(
        acc, q, do, logs, given, start, open_until, key, value, k_j, v_j, p, inside, own, segments,
        mask, mask_rows, mask_j, keys, window, scale, softcap, BLOCK_N, E, BLOCK_E, V, BLOCK_V, False,
        CAUSAL, WINDOW, SEGMENTS, SOFTCAP, MASK, BY_ROW,
    )  # fmt: skip
    acc = _grad_query_over(
        acc, q, do, logs, given, open_until, stop, key, value, k_j, v_j, p, inside, own, segments,
        mask, mask_rows, mask_j, keys, window, scale, softcap, BLOCK_N, E, BLOCK_E, V, BLOCK_V, True,
        CAUSAL, WINDOW, SEGMENTS, SOFTCAP, MASK, BY_ROW,
    )  # fmt: skip
    e = tl.arange(0, BLOCK_E)
    there = out + b * o_b + (head * o_h + i * o_i)[:, None] + e[None, :]
    tl.store(there, (acc * scale).to(out.dtype.element_ty), mask=inside[:, None] & (e[None, :] < E))


@triton.jit
def _first_row(positions, rows, position):
    """The first row at ``position`` or later, by bisection."""
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        before = tl.load(positions + middle).to(tl.int32) < position
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def grad_keys_kernel(
    grad, delta, lse, query, key, value, positions, columns, mask, segments, grad_key, grad_value,
    g_b, g_h, g_i, q_b, q_h, q_i, k_b, k_h, k_j, v_b, v_h, v_j, dk_b, dk_h, dk_j, dv_b, dv_h, dv_j,
    mask_b, mask_h, mask_i, mask_j, key_heads, rows, keys, selected, window, scale, softcap,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """dk, dv of BLOCK_N keys at ``columns`` of one instance and key head, over all rows; scores are [columns, rows]."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    first = tl.program_id(0) * BLOCK_N
    b, h = (tl.program_id(1) // key_heads).to(tl.int64), (tl.program_id(1) % key_heads).to(tl.int64)
    positions += b * rows
    columns += b * selected
    segments += b * keys
    c = first + tl.arange(0, BLOCK_N)
    j = tl.load(columns + c, mask=c < selected, other=keys).to(tl.int32)
    k = _matrix(key + b * k_b + h * k_h, j.to(tl.int64), k_j, c < selected, BLOCK_E, E, True)
    v = _matrix(value + b * v_b + h * v_h, j.to(tl.int64), v_j, c < selected, BLOCK_V, V, True)
    theirs = tl.load(segments + j, mask=j < keys, other=0) if SEGMENTS else j
    start, stop = 0, rows
    if CAUSAL:
        start = _first_row(positions, rows, tl.load(columns + first).to(tl.int32))
    elif WINDOW:
        start = _first_row(positions, rows, tl.load(columns + first).to(tl.int32) - window + 1)
    if WINDOW:
        last = tl.load(columns + tl.minimum(first + BLOCK_N, selected) - 1).to(tl.int32)
        stop = _first_row(positions, rows, last + window)
    mask += b * mask_b
    dk = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for block in range(start * GROUP, stop * GROUP, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)
        i, g, inside = _rows(m, rows, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
        p = _positions(positions, i, inside, CAUSAL or WINDOW or SEGMENTS)
        own = tl.load(segments + p, mask=inside, other=0) if SEGMENTS else i
        head = h * GROUP + g
        q = _matrix(query + b * q_b, head * q_h + i * q_i, 1, inside, BLOCK_E, E, True)
        do = _matrix(grad + b * g_b, head * g_h + i * g_i, 1, inside, BLOCK_V, V, True)
        at = (b * key_heads * GROUP + head) * rows + i
        logs = tl.load(lse + at, mask=inside, other=float("inf")) * LOG2E
        given = tl.load(delta + at, mask=inside, other=0)
        scores, capped = _scores(k, tl.trans(q), scale, softcap, SOFTCAP)  # pyright: ignore[reportGeneralTypeIssues]
        mask_rows = head * mask_h + i * mask_i
        scores = _hidden(
            scores, p[None, :], j[:, None], inside[None, :], own[None, :], theirs[:, None], window, keys,
            mask, mask_rows[None, :], mask_j, CAUSAL, WINDOW, SEGMENTS, MASK, BY_ROW,
        )  # fmt: skip
        shares = tl.exp2(scores - logs[None, :])
        dv = tl.dot(shares.to(do.dtype), do, dv, input_precision="ieee")
        grad_scores = shares * (tl.dot(v, tl.trans(do), input_precision="ieee") - given[None, :])
        if SOFTCAP:
            grad_scores *= 1 - capped * capped
        dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision="ieee")
    there = c < selected
    e, w = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_V)
    to = grad_key + b * dk_b + h * dk_h + c[:, None].to(tl.int64) * dk_j + e[None, :]
    tl.store(to, (dk * scale).to(grad_key.dtype.element_ty), mask=there[:, None] & (e[None, :] < E))
    to = grad_value + b * dv_b + h * dv_h + c[:, None].to(tl.int64) * dv_j + w[None, :]
    tl.store(to, dv.to(grad_value.dtype.element_ty), mask=there[:, None] & (w[None, :] < V))


@triton_op("tokenseek_fx::selected_attention_triton", mutates_args=())
@with_flat_visibility
def forward(
    query: Tensor, row_key: Tensor | None, row_value: Tensor | None, key: Tensor, value: Tensor,
    positions: Tensor | None, columns: Tensor | None, sinks: Tensor | None, scale: float | None, softcap: float,
    visibility: Visibility,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp) of ``selected_attention``, for head widths up to ``attention.WIDEST``."""
    out, lse = rows_like(query, value.shape[-1]), lse_like(query)
    query, key, value = _dense(query), _dense(key), _dense(value)
    options = _options(query, key, value, visibility, softcap) | {"SINKS": sinks is not None}
    tile = tile_of("forward", query.dtype, max(options["BLOCK_E"], options["BLOCK_V"]), options["BY_ROW"])
    wrap_kernel(forward_kernel)[_grid(query.shape[2] * options["GROUP"], tile["BLOCK_M"], key)](
        query, key, value, _or_query(query, positions), *visibility.kernel_tensors(query),
        query if sinks is None else sinks, out, lse,
        *_strides(query, key, value, out), *visibility.mask_strides(query, key),
        *_sizes(query, key, visibility, scale, softcap), **options, **tile,
    )  # fmt: skip
    if visibility.fully_masked is not None:
        fill(out, value, visibility.fully_masked)
    return out, lse


@triton_op("tokenseek_fx::selected_attention_triton_grad_query", mutates_args=())
@with_flat_visibility
def grad_query(
    grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None,
    scale: float | None, softcap: float, visibility: Visibility,
) -> Tensor:  # fmt: skip
    """dq by ``grad_query_kernel``."""
    out = rows_like(query, query.shape[-1])
    grad, query, key, value = _dense(grad), _dense(query), _dense(key), _dense(value)
    options = _options(query, key, value, visibility, softcap)
    tile = tile_of("grad_query", query.dtype, max(options["BLOCK_E"], options["BLOCK_V"]), options["BY_ROW"])
    wrap_kernel(grad_query_kernel)[_grid(query.shape[2] * options["GROUP"], tile["BLOCK_M"], key)](
        grad, delta.contiguous(), lse.contiguous(), query, key, value,
        _or_query(query, positions), *visibility.kernel_tensors(query), out,
        *_strides(grad, query, key, value, out), *visibility.mask_strides(query, key),
        *_sizes(query, key, visibility, scale, softcap), **options, **tile,
    )  # fmt: skip
    return out


@triton_op("tokenseek_fx::selected_attention_triton_grad_keys", mutates_args=())
@with_flat_visibility
def grad_keys(
    grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None,
    columns: Tensor, scale: float | None, softcap: float, visibility: Visibility,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk, dv of the keys at ``columns`` by ``grad_keys_kernel``."""
    selected = columns.shape[1]
    grad_key, grad_value = (rows_like(t[:, :, :selected], t.shape[-1]) for t in (key, value))
    grad, query, key, value = _dense(grad), _dense(query), _dense(key), _dense(value)
    options = _options(query, key, value, visibility, softcap)
    tile = tile_of("grad_keys", query.dtype, max(options["BLOCK_E"], options["BLOCK_V"]), options["BY_ROW"])
    heads, rows, keys, *rest = _sizes(query, key, visibility, scale, softcap)
    wrap_kernel(grad_keys_kernel)[_grid(selected, tile["BLOCK_N"], key)](
        grad, delta.contiguous(), lse.contiguous(), query, key, value,
        _or_query(query, positions), columns.contiguous(), *visibility.kernel_tensors(query), grad_key, grad_value,
        *_strides(grad, query, key, value, grad_key, grad_value), *visibility.mask_strides(query, key),
        heads, rows, keys, selected, *rest, **options, **tile,
    )  # fmt: skip
    return grad_key, grad_value


def _dense(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(size: Any, block: int, key: Tensor) -> tuple[Any, Any]:
    return triton.cdiv(size, block), key.shape[0] * key.shape[1]


def _strides(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(stride for t in tensors for stride in t.stride()[:3])


def _or_query(query: Tensor, positions: Tensor | None) -> Tensor:
    """Contiguous positions; for None ``query`` as a placeholder, which kernels never read."""
    return query if positions is None else positions.contiguous()


def _sizes(query: Tensor, key: Tensor, visibility: Visibility, scale: float | None, softcap: float) -> tuple[Any, ...]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return key.shape[1], query.shape[2], key.shape[2], visibility.window, scale, softcap


def _options(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, softcap: float) -> dict[str, Any]:
    """The constants (``tl.constexpr``) of a kernel."""
    mask = visibility.mask
    return {
        "GROUP": query.shape[1] // key.shape[1],
        **_widths(query.shape[-1], value.shape[-1]),
        **visibility.constants(),
        "SOFTCAP": softcap > 0,
        "BY_ROW": mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1),
    }


def _widths(width: int, value_width: int) -> dict[str, int]:
    padded = {"BLOCK_E": width, "BLOCK_V": value_width}
    powers = {name: max(16, 1 << (size - 1).bit_length()) for name, size in padded.items()}
    return {"E": width, "V": value_width, **powers}


#: Half precision: kernel -> head width -> (rows, keys, warps, stages) of a block; chosen by the report of ``static``.
_TILES = {
    "forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    "grad_query": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    "grad_keys": {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
}
#: The same with a mask by row, whose addresses need registers.
_TILES_BY_ROW = {
    "forward": {64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 2)},
    "grad_query": {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    "grad_keys": {64: (32, 64, 8, 1), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}
#: The same for float32.
_TILES_WIDE = {
    "forward": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1)},
    "grad_query": {64: (16, 32, 4, 1), 128: (16, 16, 8, 1)},
    "grad_keys": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1)},
}


def tile_of(kernel: str, dtype: torch.dtype, width: int, by_row: bool) -> dict[str, int]:
    """Rows and keys of a block, warps and stages. ``width``: of the heads, a power of 2; ``by_row``: of the mask."""
    tiles = (_TILES_WIDE if dtype is torch.float32 else _TILES_BY_ROW if by_row else _TILES)[kernel]
    rows, keys, warps, stages = tiles[min(w for w in tiles if w >= width)]
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


register(forward, grad_query, grad_keys)


def variants() -> list[Variant]:
    """All kernels for all head widths: causal in half precision, and with all features in half and float32."""
    plain = {
        "CAUSAL": True,
        "WINDOW": False,
        "SEGMENTS": False,
        "SOFTCAP": False,
        "SINKS": False,
        "MASK": 0,
        "BY_ROW": False,
    }
    full = dict.fromkeys(plain, True) | {"MASK": 2}
    half = [("bf16", width, group, plain, "causal") for width in (32, 64, 96, 128, 256) for group in (1, 4)]
    wide = [
        (dtype, width, 4, full, "everything")
        for dtype in ("bf16", "fp32")
        for width in (64, 128, 256)
        if dtype == "bf16" or width <= 128
    ]
    kernels = {"forward": forward_kernel, "grad_query": grad_query_kernel, "grad_keys": grad_keys_kernel}
    return [_variant(name, kernel, *case) for name, kernel in kernels.items() for case in [*half, *wide]]


def _variant(name: str, kernel: Any, dtype: str, width: int, group: int, how: dict, label: str) -> Variant:
    widths = _widths(width, width)
    tile = tile_of(name, torch.float32 if dtype == "fp32" else torch.bfloat16, widths["BLOCK_E"], how["BY_ROW"])
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    constants = {"GROUP": group, **widths, **tile, **how}
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("scale", "softcap"), NUMBER)
    tensors = ("query", "key", "value", "mask", "sinks", "out", "grad", "grad_key", "grad_value")
    types |= dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("positions", "columns", "segments"), "*i64")
    types |= {"lse": "*fp32", "delta": "*fp32"}
    signature = {n: types[n] for n in kernel.arg_names if n not in constants}
    strides = tuple(n for n in signature if n[-2:] in ("_b", "_h", "_i", "_j") and not n.startswith("mask"))
    return Variant(
        f"{dtype}, heads of {width}, group {group}, {label}", kernel, signature, constants, warps, stages, strides
    )
