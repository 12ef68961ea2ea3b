"""Losses: the loss operations of a program, and what their operands tell about other values."""

from __future__ import annotations

from torch import fx

from ..graph.errors import GraphNotSupported
from ..graph.nodes import operands_of
from ..graph.op_sets import LABEL_LOSSES, LOSSES
from ..graph.program import Program
from .activity import Activity
from .token_axes import TokenAxes


def class_factors(program: Program) -> set[int]:
    """The factors of the class dim of the losses: outputs that have them are logits."""
    logits = [program[TokenAxes].of(n.args[0]) for n in label_losses(program)]
    return {factor for labels in logits for factor in labels[min(1, len(labels) - 1)]}


def known_losses(program: Program) -> list[fx.Node]:
    """The live loss operations."""
    return [node for node in program.graph.nodes if node.target in LOSSES and node in program[Activity].live]


def label_losses(program: Program) -> list[fx.Node]:
    """Those over class labels."""
    return [node for node in known_losses(program) if node.target in LABEL_LOSSES]


def weighted_losses(program: Program) -> list[fx.Node]:
    """Those that drawn tokens have weights in: losses over tokens, not over whole sequences."""
    axes = program[TokenAxes]
    return [node for node in known_losses(program) if axes.axis_of(operands_of(node)[0]) == axes.main]


def refuse_unweighted(program: Program) -> None:
    """Raise ``GraphNotSupported`` where drawn tokens have no loss to be weighted in."""
    if not known_losses(program):
        raise GraphNotSupported(
            "No loss operation of PyTorch is in the graph, so drawn tokens have no place for a weight.",
            'Choose with select="topk", or compute the loss in the model by F.cross_entropy or F.mse_loss.',
        )
