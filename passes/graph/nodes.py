"""Nodes of a traced graph: their arguments by schema name, their tensors, their sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by their schema names, defaults filled in (positional ones as "0", "1" without a schema)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): arg for i, arg in enumerate(node.args)}, **node.kwargs}
    schema = node.target._schema.arguments
    bound = {arg.name: arg.default_value for arg in schema}
    bound.update(zip((arg.name for arg in schema), node.args, strict=False))
    return {**bound, **node.kwargs}


def made_by(node: fx.Node) -> fx.Node:
    """The operation that a value is a result of."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def is_random(node: fx.Node) -> bool:
    """True for an operation that draws (an attention without dropout does not, nor does dropout of nothing)."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = bind(node)
    return given.get("dropout_p", given.get("p")) != 0 and given.get("train") is not False


def bind_values(node: fx.Node, values: Mapping[fx.Node, Any]) -> dict[str, Any]:
    """The same with values in place of nodes."""
    return {name: values[arg] if isinstance(arg, fx.Node) else arg for name, arg in bind(node).items()}


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node in argument order, repeated ones repeated."""
    return [leaf for leaf in pytree.arg_tree_leaves(*node.args, **node.kwargs) if is_tensor(leaf)]


def bytes_hint(node: fx.Node) -> int:
    """Bytes of a node's example values; symbolic sizes count as those of the example inputs."""
    return sum(math.prod(map(hint, x.shape)) * x.element_size() for x in tensors_in(node.meta["val"]))


def hint(size: Any) -> int:
    """A size as a number; a symbolic one as it is in the example inputs."""
    return size if isinstance(size, int) else size.node.hint


def first_alike(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node the first that computes the same of the same (what is random: itself)."""
    known: dict[Any, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags:
            key = (node.target, str(fx.map_arg((node.args, node.kwargs), found.__getitem__)))
            found[node] = known.setdefault(key, node)
        else:
            found[node] = node
    return found
