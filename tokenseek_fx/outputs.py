"""Outputs beside the loss: they have the model's values, and raise an error if a gradient reaches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .passes.analysis.activity import Activity
from .passes.graph.errors import GraphNotSupported
from .passes.graph.program import Program


def without_gradient(program: Program) -> Callable[[Sequence[Any]], list[Any]]:
    """A function that guards the outputs of a rewritten program that carry gradient in the model, except its loss."""
    losses, live = program[Activity].losses, program[Activity].live
    cut = {i for i, out in enumerate(program.outputs) if losses and out in live and out not in losses}
    return lambda outputs: [_cut(x) if i in cut else x for i, x in enumerate(outputs)]


def _cut(value: Tensor) -> Tensor:
    """``value`` with requires_grad as in the model and a backward that raises.

    If it were detached, a term computed from it would silently give no gradient.
    """
    return _NoGradient.apply(value, torch.ones((), requires_grad=True))


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, _: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None]:
        if grads[0] is not None:
            raise GraphNotSupported(
                f"A gradient reached an output of shape {list(grads[0].shape)}, but if the model computes a loss, only "
                "the loss carries gradient.",
                "Add the term to the loss inside the model, or detach() the output.",
            )
        return None, None
