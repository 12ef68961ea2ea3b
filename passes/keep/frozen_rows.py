"""Frozen rows: values without gradient that are recomputed on the kept rows instead of gathered from the seek stream.

A value without gradient belongs to the seek stream. Gathering the kept rows from it keeps it alive for all tokens until
rows are selected. Under LoRA these are, in the first block, the residual stream, its norm and the result of every
frozen linear. The rows of the residual stream are enough, since the other values can be computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..analysis.activity import Activity
from ..analysis.token_axes import TokenAxes
from ..attention.positional import PositionalAttentions
from ..capture.retrace import is_autocast
from ..graph.program import Program
from ..rules.axes import rule_for
from .token_parallel import is_parallel, reads


@dataclass(frozen=True)
class FrozenRows:
    """``nodes``: the values without gradient that are computed on the kept rows."""

    nodes: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class FindFrozenRows:
    """Find values without gradient that can be recomputed from gathered rows.

    Reads ``Activity``, ``TokenAxes``, ``Routes``, ``PositionalAttentions``; writes ``FrozenRows``. None are found under
    autocast, whose regions enclose operations of all tokens.
    """

    name: str = "frozen rows"

    def run(self, program: Program) -> Program:
        if any(is_autocast(node) for node in program.graph.nodes):
            return program.with_(FrozenRows())
        live, axes = program[Activity].live, program[TokenAxes]
        read = [(x, carried) for node in live for x, carried in reads(program, node)]
        gathered = {x for x, carried in read if carried and x not in live and axes.has_rows(x)}
        found: set[fx.Node] = set()
        for node in program.graph.nodes:  # floating point alone: token ids and token types are small
            if node in gathered and node.meta["val"].is_floating_point():
                found |= _computed(program, node, gathered - {node}) or set()
        return program.with_(FrozenRows(frozenset(found)))

    def check(self, program: Program) -> None:
        """None of these values carries gradient."""
        assert program[FrozenRows].nodes.isdisjoint(program[Activity].live)


def _computed(program: Program, node: fx.Node, gathered: set[fx.Node]) -> set[fx.Node] | None:
    """The operations from gathered rows to ``node``; ``None`` if they need other values."""
    found, todo, others = set[fx.Node](), [node], {*program[Activity].live, *program[PositionalAttentions]}
    while todo:
        node = todo.pop()
        if node in found or node in gathered:
            continue
        sources = [x for x, carried in reads(program, node) if carried]
        if node in others or not (sources and rule_for(node.target) and is_parallel(program, node)):
            return None
        found.add(node)
        todo += sources
    return found
