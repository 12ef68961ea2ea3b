"""Fully masked rows: queries that see no key, in a model that masks with the lowest finite number instead of -inf.

The softmax then gives all S keys the same weight, including keys at later positions:

    out[b, h, i] = mean over all j of v_j

If the number replaces scores, only the values get gradient. If it is added to scores, the sum rounds them away, but
they still get the gradient of a softmax: ds_ij = (grad_i . v_j - grad_i . out_i) / S.

Such rows are padding, to which a loss over labels gives no gradient. So backward first checks whether there is any (on
a GPU the host waits for the answer) and does nothing if not. It runs in blocks of ATen operations on all devices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import attention_blocks as blocks
from .attention_blocks import Sight, rows_like, wide


def fill(out: Tensor, value: Tensor, fully_masked: Tensor) -> None:
    """Set the fully masked rows of ``out`` [B, H, k, Ev] to the mean of ``value`` [B, Hkv, S, Ev], in place.

    ``fully_masked``: bool [B, k], True for fully masked rows.
    """
    out.copy_(torch.where(fully_masked[:, None, :, None], _mean(value, out.shape[1]).to(out.dtype), out))


def _mean(value: Tensor, heads: int) -> Tensor:
    return value.mean(2, keepdim=True, dtype=wide(value.dtype)).repeat_interleave(heads // value.shape[1], 1)


_UNSAFE = (torch.Tag.cudagraph_unsafe,)  # its control flow depends on data


@torch.library.custom_op("tokenseek_fx::selected_attention_grad_blind", mutates_args=(), tags=_UNSAFE)
def grad_blind(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, columns: Tensor | None, fully_masked: Tensor, scored: bool,
    scale: float | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients from fully masked rows: dq, and dk and dv of the keys at ``columns`` [B, m].

    ``grad``: [B, H, k, Ev], of all rows. ``fully_masked``: bool [B, k]. dq and dk are 0 unless ``scored``. Without ``columns``
    dk and dv are empty (m = 0).
    """
    found = _fake_grad_blind(grad, query, key, value, columns)
    grad = grad.masked_fill(~fully_masked[:, None, :, None], 0)
    if not grad.any():
        return tuple(x.zero_() for x in found)
    sight = Sight.of(query, key, None, None, None, False, 0, scale, softcap)
    sight = replace(sight, share=1 / key.shape[2], scale=sight.scale if scored else 0.0)
    delta = (grad * _mean(value, grad.shape[1])).sum(-1)
    grad_query = blocks.grad_query(grad, delta, delta, query, key, value, sight)
    if columns is None:
        return grad_query, *found[1:]
    return grad_query, *blocks.grad_selected(grad, delta, delta, query, key, value, columns, sight)


@grad_blind.register_fake
def _fake_grad_blind(grad, query, key, value, columns, *rest):
    selected = 0 if columns is None else columns.shape[1]
    return rows_like(query, query.shape[-1]), *(rows_like(t[:, :, :selected], t.shape[-1]) for t in (key, value))
