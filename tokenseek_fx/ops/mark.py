"""Mark of a token axis, for models without softmax attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mark_tokens(x: Tensor, dim: int, batch_dim: int | None = 0) -> Tensor:
    """Return ``x`` and tell the backend that ``dim`` is its token axis.

    For models whose attention is no softmax: sigmoid or linear attention, recurrences. Operations that mix tokens then
    run over all tokens, on values whose rows outside the selection carry no gradient. In a graph with marks, only
    marked axes are token axes, so mark each of them (the encoder's and the decoder's) once, anywhere in the forward.
    Without ``torch.compile`` this returns ``x`` itself.

    Args:
        x: a value of the model with one row per token, such as the embedded tokens [B, T, D].
        dim: the dim of the tokens.
        batch_dim: the dim of the sequences; ``None``: one sequence.

    Raises:
        ValueError: ``x`` has no such dims, or they are the same.

    >>> mark_tokens(torch.zeros(2, 5, 8), dim=1).shape
    torch.Size([2, 5, 8])
    """
    dims = [dim] if batch_dim is None else [dim, batch_dim]
    if not all(-x.ndim <= d < x.ndim for d in dims) or len({d % x.ndim for d in dims}) < len(dims):
        raise ValueError(
            f"mark_tokens: dim={dim} and batch_dim={batch_dim} are not two dims of a tensor with {x.ndim} dims."
        )
    return _mark_tokens(x, dim, batch_dim) if torch.compiler.is_compiling() else x


@torch.library.custom_op("tokenseek_fx::mark_tokens", mutates_args=())
def _mark_tokens(x: Tensor, dim: int, batch_dim: int | None) -> Tensor:
    return x.clone()


@_mark_tokens.register_fake
def _(x: Tensor, dim: int, batch_dim: int | None) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


_mark_tokens.register_autograd(_backward)

#: The operation.
MARK = torch.ops.tokenseek_fx.mark_tokens.default
