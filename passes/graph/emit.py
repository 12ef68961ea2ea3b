"""Emit: add nodes to a graph by hand, with the metadata that passes rely on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from .fake import fake_mode_of


def emit(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call at the graph's insertion point and compute its fake value.

    The new node has the metadata (module, source line) of ``like``. A size in ``args`` is a number or a node: a
    symbolic size of an example would be a constant of the graph (see ``symbolic_sizes.Numbers``).
    """
    assert not any(isinstance(x, torch.SymInt) for x in pytree.arg_tree_leaves(*args, **kwargs)), target
    values = pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], (args, kwargs))
    node = like.graph.call_function(target, args, kwargs)
    with fake_mode_of(values), enable_python_dispatcher():  # some operations accept symbolic sizes only in Python
        node.meta = {**like.meta, "val": target(*values[0], **values[1])}
    return node
