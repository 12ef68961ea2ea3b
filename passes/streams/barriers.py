"""Barriers: operations that the ditch stream runs over all tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

from torch import fx

from ..analysis.moved_rows import MovedRows
from ..analysis.token_axes import TokenAxes
from ..graph.errors import GraphNotSupported
from ..graph.nodes import bytes_hint, operands_of
from ..graph.op_sets import LABEL_LOSSES
from ..graph.program import Program, where
from ..rules.axes import rule_for


@dataclass(frozen=True)
class Barrier:
    """An operation that the ditch stream runs over all tokens.

    Args:
        node: the operation.
        reason: why it can't be restricted to the kept rows.
        bytes: the bytes of its operands in full.
    """

    node: fx.Node
    reason: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.node.target} at {where(self.node)}: {self.reason} ({self.bytes / 2**20:.1f} MiB in full)"


def barrier_at(node: fx.Node, live: Collection[fx.Node], axes: TokenAxes, moved: bool = False) -> Barrier:
    """The barrier at ``node``, with the bytes of the live operands that are needed in full.

    ``moved``: the rows of ``node`` are moved.
    """
    reason = "it mixes tokens" if rule_for(node.target) else "the operation has no rule"
    reason = "its tokens were sliced, moved or split over dims" if moved else reason
    merged = [arg for arg in dict.fromkeys(operands_of(node)) if arg in live and (moved or axes.has_rows(arg))]
    return Barrier(node, reason, sum(bytes_hint(arg) for arg in merged))


def refuse_lost_rows(node: fx.Node) -> NoReturn:
    """Refuse a value whose rows belong to no single token.

    Raises:
        GraphNotSupported: always.
    """
    raise GraphNotSupported(
        f"The rows of different tokens meet at {node.target}, and its result has neither a row for every token nor one "
        "per sequence, so its rows belong to no single token.",
        "Combine values of all tokens, and mask positions instead of dropping them.",
        node,
    )


def refuse_partial_loss(program: Program, node: fx.Node) -> None:
    """Refuse a loss over a part of the tokens.

    A loss per instance, or over values decoded from the tokens (an image), is an ordinary loss.

    Raises:
        GraphNotSupported: the loss runs over positions that are neither all tokens nor one per sequence.
    """
    axes = program[TokenAxes]
    operand = axes.of(node.args[0])
    positions = operand[:1] + operand[2:] if node.target in LABEL_LOSSES else ()
    batches = {f for axis in axes.tokens for f in (*axis.batch, *axes.space.parts_of(axis.batch))}
    if (rows := program[MovedRows].rows.get(node.args[0])) is not None:  # type: ignore[call-overload]
        batches |= {*rows.batch}
    parts = {f for axis in axes.tokens for f in axes.space.parts_of(axis.token)}
    if set(sum(operand, ())) & parts:
        raise GraphNotSupported(
            "The loss runs over a part of the tokens, chosen before the loss, so the share of the kept tokens is not "
            "defined.",
            "Pass all tokens to the loss and mark the others with ignore_index in the labels.",
            node,
        )
    if set(sum(positions, ())) - batches - axes.space.mixtures:
        raise GraphNotSupported(
            "The loss runs over positions that are not known to be all tokens or one per sequence, so the share of the "
            "kept tokens is not defined.",
            "Pass all tokens to the loss in their own order, or one row per sequence.",
            node,
        )
