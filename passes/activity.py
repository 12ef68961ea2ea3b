"""Activity: which values carry gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .errors import GraphNotSupported
from .program import Program, attribute
from .rules.op import tensors_in

aten = torch.ops.aten
#: Operations whose result carries no gradient: new values take the dtype and device of their operand alone.
_CUT = (
    aten.detach.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
)


@dataclass(frozen=True)
class Activity:
    """``live``: the nodes whose value carries gradient. ``losses``: live 0-dim outputs. ``trainable``: live inputs."""

    live: frozenset[fx.Node]
    losses: tuple[fx.Node, ...]
    trainable: tuple[fx.Node, ...]


@dataclass(frozen=True)
class FindActivity:
    """Propagate ``requires_grad`` forward. Reads ``module``; writes ``activity``.

    ``frozen_too``: as if every parameter were trained, which makes an activation live whatever is trained.
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
        return replace(program, activity=Activity(frozenset(live), tuple(losses), trainable))

    def check(self, program: Program) -> None:
        """A written input carries no gradient: its update is taken from the full forward."""
        assert program.activity is not None
        for index, update in zip(program.mutated, program.updates, strict=True):
            if program.placeholders[index] in program.activity.live:
                raise GraphNotSupported(
                    "The forward writes to a tensor that requires grad.",
                    "Write to a buffer, or after the forward.",
                    update,
                )


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
