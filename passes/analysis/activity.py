"""Activity: which values carry gradient, and which are derived from their random draws."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from ..graph.errors import GraphNotSupported
from ..graph.nodes import is_random, tensors_in
from ..graph.op_sets import NEW_TENSORS
from ..graph.program import Program, attribute

aten = torch.ops.aten
#: Operations whose results carry no gradient.
_CUT = (aten.detach.default, *NEW_TENSORS)


@dataclass(frozen=True)
class Activity:
    """Which values carry gradient.

    Args:
        live: the nodes whose value carries gradient.
        losses: live 0-dim outputs.
        trainable: live inputs.
        drawn: values without gradient that are computed from the result of a live random operation and read by live
            values (the mask ``x > 0`` after dropout, experts chosen there). They must use the same draw as the live
            values.
    """

    live: frozenset[fx.Node]
    losses: tuple[fx.Node, ...]
    trainable: tuple[fx.Node, ...]
    drawn: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class FindActivity:
    """Find the values that carry gradient.

    Reads ``module``; writes ``Activity``.

    Args:
        frozen_too: treat every parameter as trained, so that the activations that are live do not depend on what is
            trained.

    Raises:
        GraphNotSupported: the forward mutates an input that requires grad, or the size of a value depends on data
            (``check``).
    """

    frozen_too: bool = False
    name: str = "activity"

    def run(self, program: Program) -> Program:
        live: dict[fx.Node, None] = {}
        for node, value in zip(program.placeholders, program.inputs, strict=True):
            if _is_trained(value) or (self.frozen_too and _is_parameter(value)):
                live[node] = None
        trainable = tuple(live)
        for node in program.graph.nodes:
            if _is_live(program.module, node, live):
                live[node] = None
        losses = [out for out in program.outputs if out in live and out.meta["val"].ndim == 0]
        drawn = _drawn(program.graph, live)
        return program.with_(Activity(frozenset(live), tuple(losses), trainable, drawn))

    def check(self, program: Program) -> None:
        """A mutated input carries no gradient, since its update is taken from the seek stream; sizes are known."""
        for index, update in zip(program.mutated, program.updates, strict=True):
            if program.placeholders[index] in program[Activity].live:
                raise GraphNotSupported(
                    "The forward writes to a tensor that requires grad.",
                    "Write to a buffer, or after the forward.",
                    update,
                )
        for node in program.graph.nodes:
            if node in program[Activity].live and any(map(free_unbacked_symbols, tensors_in(node.meta.get("val")))):
                raise GraphNotSupported(
                    "The size of a value that carries gradient depends on data (indexing by a mask, nonzero, a length "
                    "that is read from a tensor).",
                    "Keep the sizes: leave positions out by ignore_index or torch.where, instead of indexing.",
                    node,
                )


def _drawn(graph: fx.Graph, live: Collection[fx.Node]) -> frozenset[fx.Node]:
    """Values without gradient on a path from a live random operation to a live value."""
    reached: dict[fx.Node, None] = {}
    for node in graph.nodes:
        reads = any(arg in reached for arg in node.all_input_nodes) and node.target not in NEW_TENSORS
        if (node in live and is_random(node)) or (reads and tensors_in(node.meta.get("val"))):
            reached[node] = None
    found: set[fx.Node] = set()
    for node in reversed([node for node in reached if node not in live]):
        if any(user in live or user in found for user in node.users):
            found.add(node)
    return frozenset(found)


def _is_trained(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_parameter(value: object) -> bool:
    return isinstance(value, torch.nn.Parameter) and value.is_floating_point()


def _is_live(module: fx.GraphModule, node: fx.Node, live: dict) -> bool:
    if node.op == "get_attr":
        return _is_trained(attribute(module, str(node.target)))
    if node.op != "call_function" or node.target in _CUT:
        return False
    values = tensors_in(node.meta.get("val"))
    differentiable = any(x.is_floating_point() or x.is_complex() for x in values)
    return differentiable and any(
        isinstance(arg, fx.Node) and arg in live for arg in pytree.arg_tree_leaves(*node.args, **node.kwargs)
    )
