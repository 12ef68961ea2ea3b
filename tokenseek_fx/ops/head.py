"""Head loss: cross entropy of a linear head and its gradient at the head's input, without the logits of all tokens.

    z = scale * cap(hidden weight^T + bias),   cap(x) = softcap * tanh(x / softcap)
    loss[n] = log sum_v exp(z[n, v]) - z[n, target[n]]
    grad[n] = d loss[n] / d hidden[n]

For scores and the value of the full loss it gives the gradient at ``hidden`` at once; the loss of the kept rows, through which
the head is trained, computes their logits again in backward instead of keeping them. Other implementations of the same
idea: Cut Your Losses (arXiv 2411.09009), Liger kernels (arXiv 2410.10989), which also have gradients of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    losses = torch.zeros(target.shape, dtype=dtype, device=target.device)
    grad = torch.zeros_like(hidden) if gradient else hidden.new_empty(0)
    for part, z, slope, labels, labelled in _blocks(hidden, weight, bias, target, ignore_index, softcap, scale, dtype):
        chosen = z.gather(-1, labels)
        total = z.exp_().sum(-1, keepdim=True)
        losses[part] = (total.log() - chosen)[:, 0].where(labelled, 0)
        if gradient:
            back = _back(z, total, labels, labelled[:, None].to(dtype) * scale, slope)
            with torch.autocast(hidden.device.type, enabled=False):
                grad[part] = back.to(hidden.dtype) @ weight
    return losses, grad


Block = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def _blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    scale: float,
    dtype: torch.dtype,
) -> Iterator[Block]:
    """Some rows at a time: which, their logits less the largest, the slope of the cap, their labels [n, 1], which have one."""
    labelled = target != ignore_index
    rows = labelled.nonzero()[:, 0] if hidden.device.type == "cpu" else torch.arange(len(target), device=target.device)
    held = BLOCK_BYTES.get(hidden.device.type, BLOCK_BYTES["cpu"])
    for part in rows.split(max(1, held // (len(weight) * dtype.itemsize))):
        with torch.autocast(hidden.device.type, enabled=False):
            product = F.linear(hidden[part], weight, bias)
        z, slope = _logits(product.to(dtype), softcap, scale)
        z -= z.amax(-1, keepdim=True)
        yield part, z, slope, target[part].where(labelled[part], 0)[:, None], labelled[part]


def _back(z: Tensor, total: Tensor, labels: Tensor, by: Tensor, slope: Tensor | None) -> Tensor:
    """The slope of the loss at the product, times ``by`` [n, 1], in place of ``z``, the exponentials whose sums are ``total``."""
    z *= by / total
    z.scatter_add_(-1, labels, -by)
    return z if slope is None else z.mul_(slope)


@torch.library.custom_op("tokenseek_fx::head_loss_backward", mutates_args=())
def head_loss_backward(
    back: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    scale: float,
    dtype: torch.dtype,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``head_loss`` at ``hidden``, ``weight`` and ``bias`` (empty [0] unless ``trained``, or without a bias) for
    that of its losses, ``back`` [N]. The logits are computed again, some rows at a time."""
    grad = torch.zeros_like(hidden)
    wide = torch.promote_types(weight.dtype, torch.float32)  # many blocks are added
    of_weight = torch.zeros_like(weight, dtype=wide) if trained else weight.new_empty(0)
    of_bias = weight.new_empty(0) if bias is None or not trained else torch.zeros_like(bias)
    for part, z, slope, labels, labelled in _blocks(hidden, weight, bias, target, ignore_index, softcap, scale, dtype):
        by = (back[part] * scale).where(labelled, 0)[:, None].to(dtype)
        total = z.exp_().sum(-1, keepdim=True)
        found = _back(z, total, labels, by, slope).to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            grad[part] = found @ weight
            if trained and wide is weight.dtype:
                of_weight.addmm_(found.t(), hidden[part])
            elif trained:
                of_weight += found.t() @ hidden[part]
        if len(of_bias):
            of_bias += found.sum(0)
    return grad, of_weight.to(weight.dtype), of_bias


@head_loss_backward.register_fake
def _(back: Tensor, hidden: Tensor, weight: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    trained = rest[-1]
    none = weight.new_empty(0)
    return (
        torch.empty_like(hidden),
        torch.empty_like(weight) if trained else none,
        torch.empty_like(bias) if trained and bias is not None else weight.new_empty(0),
    )


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, target, *how, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, target)
    ctx.how = how


def _backward(ctx: Any, back: Tensor, of_gradient: Any) -> tuple:
    trained = ctx.needs_input_grad[1]
    grad, weight, bias = head_loss_backward(back, *ctx.saved_tensors, *ctx.how, trained)
    return grad, weight if trained else None, bias if ctx.needs_input_grad[2] else None, *[None] * 6


head_loss.register_autograd(_backward, setup_context=_keep)


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


@register_flop_formula(torch.ops.tokenseek_fx.head_loss_backward)
def _flops_of_backward(back: Any, hidden: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The logits again, one product with the weight, and where it is trained one for its gradient."""
    return (3 if rest[-1] else 2) * 2 * hidden[0] * hidden[1] * weight[0]
