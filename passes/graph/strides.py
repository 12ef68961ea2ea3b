"""Strides: memory and layout of values."""

from __future__ import annotations

from torch import Tensor

from .nodes import hint


def memory_of(x: Tensor) -> int:
    """An identifier of the memory of ``x``; views of one value have the same."""
    return x.untyped_storage()._cdata


def order_in_memory(x: Tensor) -> list[int]:
    """The dims of ``x`` from the outermost in memory; symbolic strides count as in the example inputs."""
    return sorted(range(x.ndim), key=lambda dim: -hint(x.stride(dim)))


def copied_in_order(x: Tensor, order: list[int]) -> Tensor:
    """A dense copy of ``x`` whose dims are in this order in memory."""
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])
