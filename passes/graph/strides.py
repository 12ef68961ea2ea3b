"""How values lie in memory."""

from __future__ import annotations

from torch import Tensor

from .nodes import hint


def memory_of(x: Tensor) -> int:
    """What tells the memory of ``x`` from that of others: views of one value have the same."""
    return x.untyped_storage()._cdata


def order_in_memory(x: Tensor) -> list[int]:
    """The dims of ``x`` from the outermost in memory; of an example where sizes are symbols."""
    return sorted(range(x.ndim), key=lambda dim: -hint(x.stride(dim)))


def copied_in_order(x: Tensor, order: list[int]) -> Tensor:
    """``x``, dense, with its dims in ``order`` in memory."""
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])
