"""Routes: the operations that sort rows, run experts and bring the rows back, on the kept rows."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..graph.nodes import is_tensor
from ..rows.row_op import Streams

aten = torch.ops.aten


def in_route(node: fx.Node, routed: Collection[fx.Node], streams: Streams, rows: MutableMapping[fx.Node, Any]) -> Any:
    """Run one operation of a route on the kept rows; its inputs from outside are restricted to them.

    Args:
        node: the operation.
        routed: the operations of all routes.
        streams: the two streams.
        rows: the results so far.
    """

    def restricted(arg: Any) -> Any:
        if not isinstance(arg, fx.Node) or arg in routed:
            return rows[arg] if isinstance(arg, fx.Node) else arg
        dim = streams.axes.row_dim(arg) if is_tensor(arg) else None
        return streams.full(arg) if dim is None else streams.rows(arg, dim)

    if node.target is aten.arange.default:  # the indices of all rows
        (places,) = (user for user in node.users if user in routed)
        return torch.arange(rows[places.args[0]].shape[0], device=node.meta["val"].device)
    args, kwargs = pytree.tree_map(restricted, (node.args, node.kwargs))
    return node.target(*args, **kwargs)
