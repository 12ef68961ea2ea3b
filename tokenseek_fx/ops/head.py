"""Head loss: cross entropy of a linear head and its gradient at the head's input, without the logits of all tokens.

    z = scale * cap(hidden weight^T + bias),   cap(x) = softcap * tanh(x / softcap)
    loss[n] = log sum_v exp(z[n, v]) - z[n, target[n]]
    grad[n] = d loss[n] / d hidden[n]

It is used where nothing is trained through it: for scores and for the value of the full loss. Other implementations of the same
idea: Cut Your Losses (arXiv 2411.09009), Liger kernels (arXiv 2410.10989), which also have gradients of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .device import HALF, runs_triton

#: Bytes of the logits that are in memory at a time: about what a CPU's caches hold; a GPU is busy with more of them only.
BLOCK_BYTES = {"cpu": 12 * 2**20, "cuda": 256 * 2**20}


def loss_of_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    scale: float,
    dtype: torch.dtype,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """``head_loss``, by the Triton kernels on a GPU in half precision (in float32 the products of cuBLAS are faster)."""
    if runs_triton(hidden) and hidden.dtype in HALF and dtype is torch.float32:
        from .head_triton import head_loss_triton

        return head_loss_triton(hidden, weight, bias, target, ignore_index, softcap, scale, gradient)
    return head_loss(hidden, weight, bias, target, ignore_index, softcap, scale, dtype, gradient)


@torch.library.custom_op("tokenseek_fx::head_loss", mutates_args=())
def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    scale: float,
    dtype: torch.dtype,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of every row and, where ``gradient`` asks for it, its gradient at ``hidden``.

    Args:
        hidden: [N, D].
        weight: [V, D], in the dtype of ``hidden``, as ``bias`` [V].
        target: int64 [N], below V; ``ignore_index`` where a row has no label.
        softcap: cap of the logits before they are scaled; 0: none.
        scale: factor of the logits.
        dtype: that of the logits in the loss, float32 or float64. The product itself is in the dtype of ``hidden``.

    Returns:
        losses [N] in ``dtype``, 0 without a label; the gradient [N, D] in the dtype of ``hidden``, or an empty [0].

    Raises:
        IndexError: a target is neither a class nor ``ignore_index`` (on the CPU).
    """
    labelled = target != ignore_index
    losses = labelled.to(dtype).zero_()
    grad = torch.zeros_like(hidden) if gradient else hidden.new_empty(0)
    rows = labelled.nonzero()[:, 0] if hidden.device.type == "cpu" else torch.arange(len(target), device=target.device)
    held = BLOCK_BYTES.get(hidden.device.type, BLOCK_BYTES["cpu"])
    block = max(1, held // (len(weight) * dtype.itemsize))
    with torch.autocast(hidden.device.type, enabled=False):
        for part in rows.split(block):
            labels = target[part].where(labelled[part], 0)
            z, slope = _logits(F.linear(hidden[part], weight, bias).to(dtype), softcap, scale)
            z -= z.amax(-1, keepdim=True)
            chosen = z.gather(-1, labels[:, None])
            total = z.exp_().sum(-1, keepdim=True)
            losses[part] = (total.log() - chosen)[:, 0].where(labelled[part], 0)
            if gradient:
                count = labelled[part, None].to(dtype) * scale
                z *= count / total
                z.scatter_add_(-1, labels[:, None], -count)
                z = z if slope is None else z.mul_(slope)
                grad[part] = z.to(hidden.dtype) @ weight
    return losses, grad


def _logits(x: Tensor, softcap: float, scale: float) -> tuple[Tensor, Tensor | None]:
    """The logits, in place of ``x``, and the slope of the cap (``None``: 1)."""
    if not softcap:
        return x.mul_(scale) if scale != 1 else x, None
    capped = torch.tanh(x.div_(softcap))
    return torch.mul(capped, softcap * scale, out=x), capped.square_().neg_().add_(1)


@head_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    dtype, gradient = how[-2:]
    return target.new_empty(target.shape, dtype=dtype), torch.empty_like(hidden) if gradient else hidden.new_empty(0)


@register_flop_formula(torch.ops.tokenseek_fx.head_loss)
def flops_of_head(hidden: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One product with the weight, and one back."""
    products = 2 if rest[-1] else 1
    return products * 2 * hidden[0] * hidden[1] * weight[0]
