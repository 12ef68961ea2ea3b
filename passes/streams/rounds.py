"""Rounds: the kept rows run a few at a time, last to first, over one prefill.

A round is the forward and backward of some of the kept rows. It reads keys and values of the seek stream; the gradient
that it sends to keys and values of other kept rows is collected, and enters the round of those rows. With causal
attention no row sends gradient to a later one, so the sum over the rounds is the gradient of all kept rows at once. Of
other operations that mix tokens (attention whose mask is not read, a cumulative sum), the backward checks this. Rows of
another token axis (the encoder's) run after them, in one round of their own.

The rounds of one token axis are a *phase*. Outputs without rows must be sums over rows; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ..analysis.activity import Activity
from ..analysis.moved_rows import MovedRows
from ..analysis.routing import Routes
from ..analysis.row_index import example_sizes
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..attention.positional import PositionalAttention, PositionalAttentions
from ..graph.errors import RoundsNotSupported
from ..graph.factors import same_size
from ..graph.nodes import is_tensor, operands_of
from ..graph.op_sets import CASTS, DIVISIONS, LAYOUT, LOSSES, MEANS, MULTIPLICATIONS, SUMS
from ..graph.program import Program
from ..rules.attention import attention_op
from .selection_plan import Selections

aten = torch.ops.aten

_ADDITIONS = (aten.add.Tensor, aten.sub.Tensor, aten.stack.default, aten.cat.default)
#: Operations that are linear in any one operand.
_LINEAR = {*LAYOUT, *CASTS, *SUMS, *MEANS, *MULTIPLICATIONS, aten.neg.default, aten.select.int}


@dataclass(frozen=True)
class Phase:
    """The rows of one token axis, in one round or several.

    Args:
        axis: the token axis.
        in_rounds: whether there are several rounds.
        live: the nodes that its rounds execute.
        read: values that it reads at all tokens and that other rounds execute, mostly keys and values; their gradient
            is collected.
        sent: values that it executes and whose gradient other rounds collect.
        outputs: the positions of the model's outputs whose gradient enters its rounds.
    """

    axis: TokenAxis
    in_rounds: bool
    live: frozenset[fx.Node]
    read: tuple[fx.Node, ...]
    sent: tuple[fx.Node, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Rounds:
    """How the backward runs: ``count`` rounds of the first of ``phases``, then one of every other phase.

    No phases: the rows run in the forward. ``kept``: the number of kept rows of every token axis. ``unproved``: of the
    collected values, those of which it isn't known that only later rows read them; the backward checks it.
    """

    count: int = 1
    phases: tuple[Phase, ...] = ()
    kept: Mapping[TokenAxis, int] = field(default_factory=dict)
    unproved: frozenset[fx.Node] = frozenset()

    def reading(self, program: Program, missing: Sequence[Sequence[fx.Node]]) -> Rounds:
        """Phases that also read these values, one sequence for each phase."""
        axes, phases = program[TokenAxes], list[Phase]()
        every = {node for nodes in missing for node in nodes}
        for phase, nodes in zip(self.phases, missing, strict=True):
            sent = {node: None for node in every if axes.axis_of(node) == phase.axis}
            own = dict.fromkeys((*phase.sent, *sorted(sent, key=str)))
            phases.append(replace(phase, read=(*phase.read, *nodes), sent=tuple(own)))
        found = {node for node in every if axes.axis_of(node) == axes.main}
        return replace(self, phases=tuple(phases), unproved=self.unproved | found)

    @property
    def inputs(self) -> int:
        """The number of inputs that are given to each round: the places of its rows, and what collects gradient."""
        return 1 + len(self.collected) if self.phases else 0

    def parts(self, kept: Any) -> list[Any]:
        """The numbers of rows of the rounds that ``kept`` rows are split into: equal if possible, else at least 2.

        A compiled graph assumes that a size that varies is not 1, so few rows run one by one.

        >>> Rounds(3).parts(6), Rounds(3).parts(7), Rounds(2).parts(3)
        ([2, 2, 2], [3, 2, 2], [1, 1, 1])
        """
        if kept < 2 * self.count:
            return [1] * kept
        return [kept // self.count + (i < kept % self.count) for i in range(self.count)]

    @property
    def collected(self) -> tuple[fx.Node, ...]:
        """The keys and values whose gradient is collected."""
        return tuple(dict.fromkeys(node for phase in self.phases for node in phase.read))


@dataclass(frozen=True)
class PlanRounds:
    """Split the ditch stream into phases, and check that rounds are exact.

    Reads ``TokenAxes``, ``Activity``, ``MovedRows``, ``PositionalAttentions``; writes ``Rounds``.

    Args:
        count: the number of rounds; 1: the rows run in the forward.
        kv_grad, given, is_fragment: as in ``Plan``.

    Raises:
        RoundsNotSupported: rounds are not exact for this graph.
    """

    count: int = 1
    kv_grad: str = "selected"
    given: Sequence[Tensor] = ()
    is_fragment: bool = False
    name: str = "rounds"

    def run(self, program: Program) -> Program:
        if self.count == 1:
            return program.with_(Rounds())
        if self.kv_grad == "all":
            raise RoundsNotSupported('Rounds cut keys and values of all tokens (kv_grad="all").', _ONE)
        if self.is_fragment:
            raise RoundsNotSupported("The graph is a fragment of a model, so its backward is not the last step.", _ONE)
        phases = tuple(_phases(program, _axes_read(program)))
        return program.with_(Rounds(self.count, phases, self._kept(program)))

    def _kept(self, program: Program) -> dict[TokenAxis, int]:
        """The number of kept rows of every token axis.

        Raises:
            RoundsNotSupported: it is a symbol.
        """
        by_axis, axes = program[Selections].by_axis, program[TokenAxes]
        kept = {axis: by_axis[axis].kept(example_sizes(program, axis)[1]) for axis in axes.tokens}
        kept |= {axes.main: self.given[0].shape[1]} if self.given else {}
        if not all(isinstance(count, int) for count in kept.values()):
            raise RoundsNotSupported("The number of kept rows changes (dynamic sizes).", _STATIC)
        return kept

    def check(self, program: Program) -> None:
        """Every live node is executed in some phase."""
        if phases := program[Rounds].phases:
            live = program[Activity].live | program[Activity].drawn
            assert live == frozenset().union(*(phase.live for phase in phases))


_ONE = "Use rounds=1."
_BOTH = "Attention in both directions: rows of different rounds would send each other gradient."
_STATIC = "Compile with dynamic=False, and pad sequences to few lengths."


def _phases(program: Program, read: Mapping[fx.Node, frozenset[TokenAxis]]) -> Iterator[Phase]:
    """The phases, those whose attentions read another axis before the phase of that axis."""
    axes = program[TokenAxes]
    by_axis = {axis: tuple(_keys_from_elsewhere(program, axis)) for axis in axes.tokens}
    for number, axis in enumerate(_in_order(program)):
        live = frozenset(node for node, found in read.items() if not found or axis in found)
        sent = dict.fromkeys(x for others in by_axis.values() for x in others if axes.axis_of(x) == axis)
        outputs = tuple(
            i for i, out in enumerate(program.outputs) if axis in read.get(out, ()) and _is_live(program, out)
        )
        yield Phase(axis, number == 0, live, by_axis[axis], tuple(sent), outputs)


def _is_live(program: Program, output: fx.Node) -> bool:
    """Whether an output of the model carries gradient: if there is a loss, only losses do."""
    activity = program[Activity]
    return output in (activity.losses or activity.live)


def _in_order(program: Program) -> list[TokenAxis]:
    axes, order = program[TokenAxes], nx.DiGraph()
    order.add_nodes_from(axes.tokens)
    for a in _with_gradient(program):
        if (edge := (axes.axis_of(a.query), axes.axis_of(a.key)))[0] != edge[1]:
            order.add_edge(*edge)
    if not nx.is_directed_acyclic_graph(order) or order.in_degree(axes.main):
        raise RoundsNotSupported("Token axes attend to each other, so none of them can run before the others.", _ONE)
    return list(nx.lexicographical_topological_sort(order, key=axes.tokens.index))


def _keys_from_elsewhere(program: Program, axis: TokenAxis) -> Iterator[fx.Node]:
    """The keys and values with gradient that attentions of an axis read from other rounds.

    Raises:
        RoundsNotSupported: a query sees later rows of its own axis.
    """
    axes, live = program[TokenAxes], program[Activity].live
    if axis == axes.main:
        _refuse_masks_of_keys(program)
    for a in _with_gradient(program):
        if axes.axis_of(a.query) != axis or (axes.axis_of(a.key) == axis and axis != axes.main):
            continue
        if axes.axis_of(a.key) == axis and not a.mask.causal:
            raise RoundsNotSupported(_BOTH, _ONE, a.query)
        yield from (x for x in (a.key, a.value) if x in live)


def _refuse_masks_of_keys(program: Program) -> None:
    """Raise ``RoundsNotSupported`` for an attention whose mask is the same for all queries."""
    axes, live = program[TokenAxes], program[Activity].live
    for a in axes.attentions:
        given = attention_op(a.node)
        if given is None or a.node in program[PositionalAttentions] or given.is_causal or given.mask is None:
            continue
        is_own = axes.queries_of(a) == axes.keys_of(a) == axes.main
        if is_own and {given.key, given.value} & live and same_size(given.mask.meta["val"].shape[-2], 1):
            raise RoundsNotSupported(_BOTH, _ONE, a.node)


def _with_gradient(program: Program) -> list[PositionalAttention]:
    """The attentions by position whose keys or values carry gradient."""
    live = program[Activity].live
    return [a for a in program[PositionalAttentions].values() if a.key in live or a.value in live]


def _axes_read(program: Program) -> dict[fx.Node, frozenset[TokenAxis]]:
    """The token axis of every live node: that of its rows, or those of the rows that a value without rows sums up.

    Raises:
        RoundsNotSupported: a value without rows is not a sum over rows.
    """
    axes, live = program[TokenAxes], program[Activity].live | program[Activity].drawn
    found: dict[fx.Node, frozenset[TokenAxis]] = {}
    routed = program[Routes].by_node(live)
    for node in (node for node in program.graph.nodes if node in live):
        if node in program[MovedRows].rows:
            raise RoundsNotSupported("Rows are sliced, moved or merged, and then run for all tokens.", _ONE, node)
        if axes.has_rows(node):
            axis = axes.axis_of(node)
            assert axis is not None
            found[node] = frozenset({axis})
            if any(found.get(arg) and not axes.has_rows(arg) and arg not in routed for arg in node.all_input_nodes):
                raise RoundsNotSupported("Rows read a sum over the rows of several rounds.", _ONE, node)
            continue
        found[node] = frozenset().union(*(found.get(arg, ()) for arg in node.all_input_nodes))
        if found[node] and node not in routed:
            _check_sum(program, node, found)
    for node in program.outputs:
        if found.get(node) == frozenset() and _is_live(program, node):
            raise RoundsNotSupported("An output with gradient is computed from parameters alone.", _ONE, node)
    return found


def _check_sum(program: Program, node: fx.Node, found: Mapping[fx.Node, frozenset[TokenAxis]]) -> None:
    """Raise ``RoundsNotSupported`` unless a value without rows is linear in the sums over rows that it reads."""
    operands, axes, live = operands_of(node), program[TokenAxes], program[Activity].live
    of_rows = [x for x in operands if found.get(x)]
    if axes.has_rows(of_rows[0]):
        is_sum = node.target in (*LOSSES, *SUMS, *MEANS)
    elif node.target in _ADDITIONS:
        is_sum = all(x in of_rows or x not in live for x in operands)
    else:
        is_divided = node.target in DIVISIONS and node.args[0] in of_rows
        is_sum = len(of_rows) == 1 and (node.target in _LINEAR or is_divided)
    if not is_tensor(node) or len(found[node]) > 1 or not is_sum:
        raise RoundsNotSupported("A value is computed from rows of several rounds and is no sum over rows.", _ONE, node)
