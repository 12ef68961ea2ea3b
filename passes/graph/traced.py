"""The nodes of tensors in a graph that is being traced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, set_proxy_slot

from .nodes import tensors_in


def node_of(value: Tensor) -> fx.Node | None:
    """The node of a tensor in the graph that is being traced; ``None`` if there is none."""
    mode = get_proxy_mode()
    return None if mode is None else get_proxy_slot(value, mode.tracer, None, lambda place: place.proxy.node)


@contextmanager
def nodes_kept(values: Iterable[Any]) -> Iterator[None]:
    """Give tensors the nodes back that they have now: an operation that returns its operand gives it its own node."""
    if (mode := get_proxy_mode()) is None:
        yield
        return
    places = [(x, get_proxy_slot(x, mode.tracer, None)) for x in tensors_in([*values])]
    yield
    for x, place in places:
        if place is not None:
            set_proxy_slot(x, mode.tracer, place)
