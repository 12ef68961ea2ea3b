"""Losses: the loss operations of a program, and facts that follow from their operands."""

from __future__ import annotations

from torch import fx

from ..graph.errors import GraphNotSupported
from ..graph.nodes import operands_of
from ..graph.op_sets import LABEL_LOSSES, LOSSES
from ..graph.program import Program
from .activity import Activity
from .moved_rows import MovedRows
from .token_axes import TokenAxes


def class_factors(program: Program) -> set[int]:
    """The factors of the class dim of the losses; outputs that have them are logits."""
    logits = [program[TokenAxes].of(n.args[0]) for n in label_losses(program)]
    return {factor for labels in logits for factor in labels[min(1, len(labels) - 1)]}


def known_losses(program: Program) -> list[fx.Node]:
    """The live loss operations."""
    return [node for node in program.graph.nodes if node.target in LOSSES and node in program[Activity].live]


def label_losses(program: Program) -> list[fx.Node]:
    """The live losses over class labels."""
    return [node for node in known_losses(program) if node.target in LABEL_LOSSES]


def weighted_losses(program: Program) -> list[fx.Node]:
    """The live losses over tokens, where drawn tokens are weighted; not losses over whole sequences."""
    axes, moved = program[TokenAxes], program[MovedRows].rows
    over = {node: operands_of(node)[0] for node in known_losses(program)}
    return [n for n, x in over.items() if (moved[x].axis if x in moved else axes.axis_of(x)) == axes.main]


def refuse_unweighted(program: Program) -> None:
    """Refuse drawn tokens if there is no loss where they can be weighted.

    Raises:
        GraphNotSupported: the graph has no known loss operation.
    """
    if not known_losses(program):
        raise GraphNotSupported(
            "The graph has no loss operation of PyTorch, so drawn tokens have no place for a weight.",
            'Use select="topk", or compute the loss in the model with F.cross_entropy or F.mse_loss.',
        )
