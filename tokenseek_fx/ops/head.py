"""Head loss: cross entropy of a linear head and its gradient at the head's input, without the logits of all tokens.

    z = scale * cap(hidden weight^T + bias),   cap(x) = softcap * tanh(x / softcap)
    loss[n] = log sum_v exp(z[n, v]) - z[n, target[n]]
    grad[n] = d loss[n] / d hidden[n]

The logits are computed in tiles of rows by classes: once for the log-sum-exp of the rows and once more for gradients.
The weight is read once for many rows. For scoring, the operator returns the gradient at ``hidden`` with the loss. For
the loss of the kept rows, which trains the head, it saves only their log-sum-exp for backward. Other implementations of
the idea: Cut Your Losses (arXiv 2411.09009), Liger kernels (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .device import HALF, runs_triton

#: Bytes of a tile of logits: about the size of a CPU core's caches; a GPU needs larger tiles to be busy.
TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
#: The classes of a tile are a multiple of this: for rows not aligned to 16 bytes, cuBLAS has only old, slow kernels.
_ALIGNED = 64
#: Tiles that are kept in memory at a time, for the gradient, which needs them a second time.
_KEPT = 6


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
    """Losses and gradient of ``head_loss``; by Triton kernels on a GPU in half precision (cuBLAS wins in float32)."""
    if runs_triton(hidden) and hidden.dtype in HALF and dtype is torch.float32:
        from .head_triton import head_loss_triton

        return head_loss_triton(hidden, weight, bias, target, ignore_index, softcap, scale, gradient)
    losses, found, _ = head_loss(hidden, weight, bias, target, ignore_index, softcap, scale, dtype, gradient)
    return losses, found


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row and, if ``gradient`` is set, its gradient at ``hidden``.

    Args:
        hidden: [N, D].
        weight: [V, D], in the dtype of ``hidden``.
        bias: [V], in the dtype of ``hidden``, or None.
        target: int64 [N], below V, or ``ignore_index`` for a row without a label.
        softcap: cap of the logits before they are scaled; 0: none.
        scale: factor of the logits.
        dtype: dtype of the logits in the loss, float32 or float64. The matrix product is in the dtype of ``hidden``.
        gradient: compute the gradient.

    Returns:
        The losses [N] in ``dtype``, 0 without a label; the gradient [N, D] in the dtype of ``hidden``, or an empty [0];
        the log-sum-exp of the logits [N] in ``dtype`` (on the CPU 0 without a label).

    Raises:
        IndexError: a target is neither a class nor ``ignore_index`` (on the CPU).
        RuntimeError: there is not one target for each row of ``hidden``.
    """
    check_rows(hidden, target)
    head, labelled = _Head(weight, bias, softcap, scale, dtype), target != ignore_index
    # raises for a label out of range, which no tile would contain
    weight[:, :1].gather(0, target.where(labelled, 0)[:, None])
    losses, total = (torch.zeros(target.shape, dtype=dtype, device=target.device) for _ in range(2))
    grad = torch.zeros_like(hidden) if gradient else hidden.new_empty(0)
    side = _side(hidden.device, dtype)
    for part in _parts(labelled, max(1, _KEPT * side**2 // len(weight)) if gradient else side):
        rows, labels = hidden[part], target[part].where(labelled[part], 0)[:, None]
        tiles = list(head.tiles(rows)) if gradient else head.tiles(rows)
        total[part], chosen = _log_sum_exp(tiles, labels, total)
        losses[part] = (total[part] - chosen).where(labelled[part], 0)
        if gradient:
            by = labelled[part, None].to(dtype) * scale
            grad[part] = _back(tiles, rows, labels, by, total[part], head, None, None)
    return losses, grad, total


def check_rows(hidden: Tensor, target: Tensor) -> None:
    """Raise ``RuntimeError`` unless there is one target for each row; symbolic sizes get a guard if need be."""
    torch._check(
        hidden.ndim == 2 and target.ndim == 1 and hidden.shape[0] == target.shape[0],
        lambda: f"head_loss: expected hidden [N, D] and target [N], got {[*hidden.shape]} and {[*target.shape]}.",
    )


def _parts(labelled: Tensor, count: int) -> Iterator[Tensor]:
    """Indices of rows, ``count`` at a time, that go through the classes together; on the CPU only rows with a label."""
    every = torch.arange(len(labelled), device=labelled.device)
    rows = labelled.nonzero()[:, 0] if labelled.device.type == "cpu" else every
    return iter(rows.split(count))


Tile = tuple[slice, Tensor, Tensor | None]


def _side(device: torch.device, dtype: torch.dtype) -> int:
    """The side of a square tile, in elements."""
    return max(1, isqrt(TILE_BYTES.get(device.type, TILE_BYTES["cpu"]) // dtype.itemsize))


@dataclass(frozen=True)
class _Head:
    """``weight`` [V, D], ``bias`` [V], and how logits are made from their product with rows."""

    weight: Tensor
    bias: Tensor | None
    softcap: float
    scale: float
    dtype: torch.dtype

    def tiles(self, hidden: Tensor) -> Iterator[Tile]:
        """For each tile: its classes, the logits of the rows [n, classes], and the derivative of the cap."""
        width = max(1, _side(hidden.device, self.dtype) ** 2 // max(1, len(hidden)))
        width -= width % _ALIGNED if width > _ALIGNED else 0
        for start in range(0, len(self.weight), width):
            classes = slice(start, min(start + width, len(self.weight)))
            yield classes, *_logits(self._product(hidden, classes).to(self.dtype), self.softcap, self.scale)

    def _product(self, hidden: Tensor, classes: slice) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, self.weight[classes], None if self.bias is None else self.bias[classes])


def _log_sum_exp(tiles: Iterable[Tile], labels: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of rows [n] and their logits at ``labels`` [n, 1], as [n]; in the dtype of ``like``."""
    total, chosen = like.new_full(labels.shape, -torch.inf), like.new_zeros(labels.shape)
    for classes, z, _ in tiles:
        at, inside = _within(labels, classes)
        chosen += z.gather(-1, at).where(inside, 0)
        largest = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)  # finite, even if all logits are -inf
        total = torch.logaddexp(total, (z - largest).exp_().sum(-1, keepdim=True).log_().add_(largest))
    return total[:, 0], chosen[:, 0]


def _back(
    tiles: Iterable[Tile],
    rows: Tensor,
    labels: Tensor,
    by: Tensor,
    total: Tensor,
    head: _Head,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
) -> Tensor:
    """The gradient at ``rows`` of their losses times ``by`` [n, 1]. Overwrites the tiles.

    Gradients at weight and bias are added to ``of_weight`` and ``of_bias``, if given.
    """
    grad = torch.zeros_like(rows, dtype=_wide(rows))
    for classes, z, slope in tiles:
        at, inside = _within(labels, classes)
        z.sub_(total[:, None]).exp_().mul_(by).scatter_add_(-1, at, -by.where(inside, 0))
        found = (z if slope is None else z.mul_(slope)).to(rows.dtype)
        _add_product(grad, found, head.weight[classes])
        if of_weight is not None:
            _add_product(of_weight[classes], found.t(), rows)
        if of_bias is not None:
            of_bias[classes] += found.sum(0)
    return grad.to(rows.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of a sum over many tiles: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _within(labels: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """The indices of the labels in a tile, clamped, and whether each label is in it."""
    at, size = labels - classes.start, classes.stop - classes.start
    return at.clamp(0, size - 1), (at >= 0) & (at < size)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``"""
    with torch.autocast(a.device.type, enabled=False):
        if out.dtype is a.dtype:
            out.addmm_(a, b)
        else:
            out += a @ b


@torch.library.custom_op("tokenseek_fx::head_loss_backward", mutates_args=())
def head_loss_backward(
    back: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    total: Tensor,
    ignore_index: int,
    softcap: float,
    scale: float,
    dtype: torch.dtype,
    weight_trained: bool,
    bias_trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``head_loss`` at ``hidden``, ``weight`` and ``bias``, given ``back`` [N], that of its losses.

    Those at weight and bias are empty, [0], if not trained. The logits are recomputed. ``total`` [N]: the log-sum-exp
    that ``head_loss`` returned.
    """
    check_rows(hidden, target)
    head, labelled = _Head(weight, bias, softcap, scale, dtype), target != ignore_index
    grad, by = torch.zeros_like(hidden), (back * scale).where(labelled, 0).to(dtype)[:, None]
    parts = list(_parts(labelled, _side(hidden.device, dtype)))
    of_weight, of_bias = (
        # a single part writes each entry once: no sum that half precision would round
        torch.zeros_like(x, dtype=_wide(x) if len(parts) > 1 else x.dtype) if x is not None and trained else None
        for x, trained in ((weight, weight_trained), (bias, bias_trained))
    )
    for part in parts:
        rows, labels = hidden[part], target[part].where(labelled[part], 0)[:, None]
        grad[part] = _back(head.tiles(rows), rows, labels, by[part], total[part], head, of_weight, of_bias)
    of_weight, of_bias = (weight.new_empty(0) if x is None else x.to(weight.dtype) for x in (of_weight, of_bias))
    return grad, of_weight, of_bias


@head_loss_backward.register_fake
def _(back: Tensor, hidden: Tensor, weight: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    trained = ((weight, rest[-2]), (bias, rest[-1]))
    of_weight, of_bias = (torch.empty_like(x) if wanted else weight.new_empty(0) for x, wanted in trained)
    return torch.empty_like(hidden), of_weight, of_bias


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, target, *how, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, target, output[2])
    ctx.how = how


def _backward(ctx: Any, back: Tensor, *others: Any) -> tuple:
    trained = ctx.needs_input_grad[1:3]
    grad, of_weight, of_bias = head_loss_backward(back, *ctx.saved_tensors, *ctx.how, *trained)
    return grad, of_weight if trained[0] else None, of_bias if trained[1] else None, *[None] * 6


head_loss.register_autograd(_backward, setup_context=_keep)


def _logits(x: Tensor, softcap: float, scale: float) -> tuple[Tensor, Tensor | None]:
    """The logits, computed in place in ``x``, and the derivative of the cap (``None``: 1)."""
    if not softcap:
        return x.mul_(scale) if scale != 1 else x, None
    capped = torch.tanh(x.div_(softcap))
    return torch.mul(capped, softcap * scale, out=x), capped.square_().neg_().add_(1)


@head_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_rows(hidden, target)
    dtype, gradient = how[-2:]
    losses, total = (target.new_empty(target.shape, dtype=dtype) for _ in range(2))
    return losses, torch.empty_like(hidden) if gradient else hidden.new_empty(0), total


@register_flop_formula(torch.ops.tokenseek_fx.head_loss)
def flops_of_head(hidden: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs: one product with the weight, and one more for the gradient."""
    products = 2 if rest[-1] else 1
    return products * 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.tokenseek_fx.head_loss_backward)
def _flops_of_backward(back: Any, hidden: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs: the logits recomputed, one product with the weight, and one for its gradient if it is trained."""
    return (3 if rest[-2] else 2) * 2 * hidden[0] * hidden[1] * weight[0]
