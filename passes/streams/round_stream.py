"""Round stream: the ditch stream of one round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from ..analysis.row_index import RowIndex, device_of, example_sizes
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..analysis.values import feeds_attention
from ..capture.retrace import applied
from ..graph.factors import Axes
from ..graph.fake import varying
from ..graph.kinds import Kind, Mark, tagged
from ..graph.nodes import operands_of
from ..graph.op_sets import LAYOUT, MEANS, SUMS
from ..graph.program import Program
from ..keep.recompute_kv import Value
from ..rows.row_op import RowOp
from .ditch_stream import DitchStream
from .rounds import Phase, Rounds


class RoundStream(DitchStream):
    """The ditch stream of one round of a phase.

    Args:
        program, seek, inputs, cast: as in ``DitchStream``.
        phase: the phase.
        kept: the kept rows of every token axis.
        leaves: for the values that the phase reads from other rounds, what collects the gradient of their kept rows.
        places: int64 [m], the places of the round's rows among the kept rows; ``None``: all of them.
    """

    def __init__(
        self,
        program: Program,
        seek: Mapping[fx.Node, Any],
        inputs: tuple,
        cast: Mapping[Value, Tensor],
        phase: Phase,
        kept: Sequence[RowIndex],
        leaves: Mapping[fx.Node, Tensor],
        places: Tensor | None,
    ) -> None:
        own = [index.in_round(places) if places is not None and index.axis == phase.axis else index for index in kept]
        super().__init__(program, seek, own, inputs, cast=cast)
        self.phase, self.leaves = phase, leaves
        self.every_live, self.live = self.live, phase.live
        #: Values that were read from other rounds and that have no leaf; they are without gradient.
        self.missing: list[fx.Node] = []

    def row_index(self, axis: TokenAxis) -> Tensor:
        """The rows of the round, int64 [B, m]."""
        return self._row_indices[axis].indices

    def own(self, node: fx.Node) -> Any:
        """The rows of a value that are executed in this round; of a value without rows, all of it."""
        return self.rows(node, self._dim(node)) if self.axes.has_rows(node) else self.full(node)

    def full(self, node: fx.Node) -> Any:
        """The value for all tokens; rows of other rounds collect their gradient.

        ``node`` may have rows that this phase executes, all at once or a few of them, or those of another phase.
        """
        is_own = node in self.live and not self.phase.in_rounds
        if node not in self.every_live or is_own or not self.axes.has_rows(node):
            return super().full(node)
        if node not in self._merged:
            kind = Kind.KEYS_VALUES if feeds_attention(node) else Kind.BARRIER
            with tagged(kind, node, Mark.KEYS_VALUES if kind is Kind.KEYS_VALUES else None):
                self._merged[node] = self._of_all_rounds(node)
        return self._merged[node]

    def _of_all_rounds(self, node: fx.Node) -> Tensor:
        if node.target in LAYOUT and len(operands_of(node)) == 1:
            return applied(node, *RowOp(node, self, None).in_full)
        index, labels, dim = self._every_round(node), self.axes.of(node), self._dim(node)
        if node not in self.leaves:
            self.missing.append(node)
            return self.seek[node]
        known = index.take(self.seek[node], labels, dim)
        return index.put(self.seek[node], self._with_own(node, known + self.leaves[node]), labels, dim)

    def _with_own(self, node: fx.Node, rows: Tensor) -> Tensor:
        """The kept rows of all rounds, with those that this round executes in their places."""
        if node not in self.live:
            return rows
        index, labels, dim = self.row_index_of(node).among_kept, self.axes.of(node), self._dim(node)
        return index.put(rows, self.rows(node, dim), labels, dim)

    def _rows_across(self, node: fx.Node, labels: Axes, dim: int) -> Tensor:
        if self.phase.in_rounds:
            return self.take(self.full(node), labels, dim)
        return super()._rows_across(node, labels, dim)

    def kept_keys(self, key: fx.Node, value: fx.Node) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.leaves.keys().isdisjoint((key, value)):
            return super().kept_keys(key, value)
        return self._of_kept(key), self._of_kept(value), self._every_round(key).indices

    def _of_kept(self, node: fx.Node) -> Tensor:
        """The kept rows of keys or values, of which attention reads only the gradient."""
        if node not in self.leaves:
            return self._every_round(node).take(self.seek[node], self.axes.of(node), self._dim(node))
        return self._with_own(node, self.leaves[node])

    def _every_round(self, node: fx.Node) -> RowIndex:
        return self.row_index_of(node).every_round

    def _dim(self, node: fx.Node) -> int:
        dim = self.axes.row_dim(node)
        assert dim is not None
        return dim

    def _in_full(self, call: RowOp) -> Any:
        """A sum over tokens is summed over the round's rows; its mean over all tokens is a share of theirs."""
        operand = call.operands[0]
        if call.node.target not in (*SUMS, *MEANS) or call.dim is not None or not self.axes.has_rows(operand):
            return super()._in_full(call)
        rows = self.rows(operand, self._dim(operand))
        result = applied(call.node, (rows, *call.node.args[1:]), call.node.kwargs)
        index = call.row_index
        return result if call.node.target in SUMS else result * (index.kept / index.tokens)


def round_inputs(program: Program) -> list[Tensor]:
    """Examples of the inputs of a round: the places of its rows, and what collects gradient. Empty without rounds.

    The number of rows is a symbol unless all rounds have equally many.
    """
    rounds, axes = program[Rounds], program[TokenAxes]
    if not rounds.phases:
        return []
    device, mode, parts = device_of(program), detect_fake_mode(program.inputs), rounds.parts(rounds.kept[axes.main])
    with mode or nullcontext():
        leaves = [_leaf(program, node, device) for node in rounds.collected]
        places = torch.arange(parts[0], device=device)
    is_static = len({*parts}) == 1 or mode is None or mode.shape_env is None
    return [places if is_static else varying(mode, places), *leaves]


def _leaf(program: Program, node: fx.Node, device: torch.device) -> Tensor:
    axes, value = program[TokenAxes], node.meta["val"]
    axis, dim = axes.axis_of(node), axes.row_dim(node)
    assert axis is not None and dim is not None
    _, tokens = example_sizes(program, axis)
    shape = [*value.shape]
    shape[dim] = shape[dim] // tokens * program[Rounds].kept[axis]
    return collecting(torch.zeros((), dtype=value.dtype, device=device), shape)


def collecting(zero: Tensor, shape: Sequence[Any]) -> Tensor:
    """Zeros whose gradient is collected. They take no memory."""
    return zero.expand(shape).requires_grad_()
