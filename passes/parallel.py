"""Parallel: along which dims of its outputs a graph works on every row alone, whichever of them is the token axis.

A part of a model without an attention does not tell its token axis. Where it is parallel along it, gradient that comes to
some rows alone stays in them, so the part is right as it is. Sound rather than complete: an operation without a rule is none.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from .program import Program
from .rules.op import operands_of
from .token_axes import TokenAxes, TokenAxis, inferred

#: For a dim of an output: the dims of the inputs that carry gradient which its rows come from.
Sources = dict[int, dict[int, int]]


def parallel_dims(program: Program) -> dict[int, Sources]:
    """By the position of every live output, its parallel dims. Reads ``activity``."""
    found, places = inferred(program), {node: i for i, node in enumerate(program.placeholders)}
    live = program.activity.live
    result: dict[int, Sources] = {}
    for position, out in enumerate(program.outputs):
        if not isinstance(out, fx.Node) or out not in live:
            continue
        result[position] = {}
        for dim, label in enumerate(found.of(out)):
            axes = replace(found, tokens=(TokenAxis(label),))
            if label and all(_works_by_rows(axes, node, live) for node in program.graph.nodes if node in live):
                sources = {places[node]: axes.row_dim(node) for node in live if node in places}
                result[position][dim] = {i: at for i, at in sources.items() if at is not None}
    return result


def _works_by_rows(axes: TokenAxes, node: fx.Node, live: frozenset[fx.Node]) -> bool:
    """Every row of the result comes from the same row of the operands that have rows, of which there is one at least."""
    operands, dims = operands_of(node), axes.token_dims(node)
    having = [i for i, arg in enumerate(operands) if axes.token_dims(arg)]
    if node.target is operator.getitem:
        return bool(dims) or not having
    if node.op != "call_function" or not dims:
        return not any(operands[i] in live for i in having)
    carried = [i for i in having if len(axes.token_dims(operands[i])) == 1 and _carries(axes, node, i, dims[0])]
    return len(dims) == 1 and bool(carried) and all(i in carried for i in having if operands[i] in live)


def _carries(axes: TokenAxes, node: fx.Node, operand: int, dim: int) -> bool:
    return axes.carried(node, operand, dim) is not None
