"""A copy that the compiler does not remove."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("tokenseek_fx::copied", mutates_args=())
def _copied(x: Tensor) -> Tensor:
    """A contiguous copy of ``x``, of any dtype and shape, in its own memory; without gradient.

    Inductor removes a ``clone`` that keeps the strides, and returns a view instead.
    """
    return x.clone(memory_format=torch.contiguous_format)


@_copied.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


#: The operation.
copied = torch.ops.tokenseek_fx.copied.default
