"""Head loss on a GPU: two Triton kernels that compute the logits block by block and never store them.

The first kernel goes over a part of the vocabulary for a block of rows and computes log-sum-exp and the logit of the
label. The second recomputes the logits and adds (softmax - one-hot) @ weight to the gradient of its rows. No other
program writes these rows, so the order of the sum is fixed and results are deterministic. The ATen implementation in
``head.py`` is the definition; the idea is that of Cut Your Losses (arXiv 2411.09009).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula

from ..compat import wrap_kernel
from .head import check_rows, flops_of_head
from .static import NUMBER, Variant

WARPS, STAGES = 8, 3
#: Bytes that a thread may spill, outside the matrix products: blocks without spills are slower (H100,
#: docs/design/0013).
SPILLS = 128
#: The number of parts into which the first kernel splits the vocabulary.
PARTS = 8


@triton.jit
def _logits(
    hidden, weight, bias, n, v, rows, classes, scale, softcap, h_n, h_d, w_v, w_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(logits [rows n, classes v], derivative of the cap); logits are -inf beyond the vocabulary."""
    x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    far_n, far_v = n.to(tl.int64), v.to(tl.int64)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(
            hidden + far_n[:, None] * h_n + d[None, :] * h_d, mask=(n[:, None] < rows) & (d[None, :] < D), other=0
        )
        w = tl.load(
            weight + far_v[None, :] * w_v + d[:, None] * w_d, mask=(v[None, :] < classes) & (d[:, None] < D), other=0
        )
        x = tl.dot(h, w, x, input_precision="ieee")
    if BIAS:
        x += tl.load(bias + v, mask=v < classes, other=0).to(tl.float32)[None, :]
    slope = scale
    if SOFTCAP:
        capped = 2 * tl.sigmoid(2 * x / softcap) - 1
        slope = scale * (1 - capped * capped)
        x = softcap * capped
    return tl.where(v[None, :] < classes, x * scale, -float("inf")), slope


@triton.jit
def loss_kernel(
    hidden, weight, bias, target, lse, chosen,
    rows, classes, part, scale, softcap, h_n, h_d, w_v, w_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """For part p of the classes: lse[p, n] = log sum_v exp(z[n, v]); chosen[p, n] = z[n, target[n]], 0 if not in p."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * part
    label = tl.load(target + n, mask=n < rows, other=-1)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    found = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + part, classes), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z, _ = _logits(
            hidden, weight, bias, n, v, rows, classes, scale, softcap, h_n, h_d, w_v, w_d,
            D, BLOCK_N, BLOCK_V, BLOCK_D, BIAS, SOFTCAP,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
        found += tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1)
    at = tl.program_id(1).to(tl.int64) * rows + n
    tl.store(lse + at, tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), -float("inf")), mask=n < rows)
    tl.store(chosen + at, found, mask=n < rows)


@triton.jit
def gradient_kernel(
    hidden, weight, bias, target, lse, grad,
    rows, classes, ignored, scale, softcap, h_n, h_d, w_v, w_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """grad[n, :] += sum_v (exp(z[n, v] - lse[n]) - [v = target[n]]) slope[n, v] weight[v, :] for rows with a label."""
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    far_n = n.to(tl.int64)
    label = tl.load(target + n, mask=n < rows, other=ignored)
    labelled = label != ignored
    of_rows = tl.load(lse + n, mask=n < rows, other=0)
    last = tl.where(tl.max(labelled.to(tl.int32), 0) > 0, classes, 0)
    for start in range(0, last, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        far_v = v.to(tl.int64)
        z, slope = _logits(
            hidden, weight, bias, n, v, rows, classes, scale, softcap, h_n, h_d, w_v, w_d,
            D, BLOCK_N, BLOCK_V, BLOCK_D, BIAS, SOFTCAP,
        )  # fmt: skip
        share = tl.exp(z - of_rows[:, None]) - tl.where(v[None, :] == label[:, None], 1.0, 0.0)
        share = tl.where(labelled[:, None], share * slope, 0.0).to(weight.dtype.element_ty)
        for begin in range(0, D, BLOCK_D):
            d = begin + tl.arange(0, BLOCK_D)
            w = tl.load(
                weight + far_v[:, None] * w_v + d[None, :] * w_d,
                mask=(v[:, None] < classes) & (d[None, :] < D),
                other=0,
            )
            place, inside = grad + far_n[:, None] * D + d[None, :], (n[:, None] < rows) & (d[None, :] < D)
            before = tl.load(place, mask=inside, other=0)
            tl.store(place, tl.dot(share, w, before, input_precision="ieee"), mask=inside)


@triton_op("tokenseek_fx::head_loss_triton", mutates_args=())
def head_loss_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(losses [N] in float32, gradient [N, D] or [0]) of ``head_loss``; arguments as there, at most float32."""
    check_rows(hidden, target)
    (rows, width), classes = hidden.shape, weight.shape[0]
    flags = {"BIAS": bias is not None, "SOFTCAP": softcap != 0, "num_warps": WARPS, "num_stages": STAGES}
    options = blocks(width, "loss") | flags
    given = (hidden, weight, hidden if bias is None else bias, target)
    how = (scale, softcap, *hidden.stride(), *weight.stride())
    part = triton.cdiv(triton.cdiv(classes, PARTS), options["BLOCK_V"]) * options["BLOCK_V"]
    lse, chosen = (hidden.new_empty((PARTS, rows), dtype=torch.float32) for _ in range(2))
    grid = (triton.cdiv(rows, options["BLOCK_N"]), PARTS)
    wrap_kernel(loss_kernel)[grid](*given, lse, chosen, rows, classes, part, *how, **options)
    whole = lse.logsumexp(0)
    losses = (whole - chosen.sum(0)).where(target != ignore_index, 0.0)
    if not gradient:
        return losses, hidden.new_empty(0)
    grad = hidden.new_zeros((rows, width), dtype=torch.float32)
    options = blocks(width, "gradient") | flags
    grid = (triton.cdiv(rows, options["BLOCK_N"]),)
    wrap_kernel(gradient_kernel)[grid](*given, whole, grad, rows, classes, ignore_index, *how, **options)
    return losses, grad.to(hidden.dtype)


register_flop_formula(torch.ops.tokenseek_fx.head_loss_triton)(flops_of_head)


def blocks(width: int, kernel: str) -> dict[str, int]:
    """Block sizes for hidden states of ``width`` features in half precision; measured on an H100 (docs/design/0013)."""
    return {"D": width, "BLOCK_N": {"loss": 128, "gradient": 64}[kernel], "BLOCK_V": 256, "BLOCK_D": 64}


def variants() -> list[Variant]:
    """Both kernels in half precision, plain and with bias and softcap."""
    cases = [(width, full) for width in (512, 4096) for full in (False, True)]
    return [_variant(kernel, *case) for kernel in (loss_kernel, gradient_kernel) for case in cases]


def _variant(kernel: triton.JITFunction, width: int, full: bool) -> Variant:
    name = "loss" if kernel is loss_kernel else "gradient"
    constants = {**blocks(width, name), "BIAS": full, "SOFTCAP": full, "h_d": 1, "w_d": 1}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("hidden", "weight", "bias"), "*bf16")
    types |= dict.fromkeys(("lse", "chosen", "grad"), "*fp32") | {"target": "*i64", "scale": NUMBER, "softcap": NUMBER}
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    label = f"bf16, width {width}" + (", bias and soft cap" if full else "")
    return Variant(label, kernel, signature, constants, WARPS, STAGES, aligned=("h_n", "w_v"), spills=SPILLS)
