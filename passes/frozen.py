"""Frozen: values without gradient that the rows are made of, made again on the rows.

What no gradient reaches is the seek stream's, and its rows are taken from there: so it exists for all tokens until these are
chosen. Under LoRA that is, of the first block, the residual stream, its norm, and what every frozen linear makes of it. Of
these the residual stream is enough: the others are made of its rows.
"""

from __future__ import annotations

from torch import fx

from .canonicalize import is_autocast
from .parallel import is_parallel, reads
from .program import Program
from .rules.axes import rule_for


def made_of_rows(program: Program) -> frozenset[fx.Node]:
    """Values without gradient that are computed on the rows, from rows that are taken anyway. None under autocast, whose
    regions enclose the operations of all tokens."""
    if any(is_autocast(node) for node in program.graph.nodes):
        return frozenset()
    live, axes = program.activity.live, program.axes
    read = [(x, carried) for node in live for x, carried in reads(program, node)]
    taken = {x for x, carried in read if carried and x not in live and axes.has_rows(x)}
    found: set[fx.Node] = set()
    for node in program.graph.nodes:  # numbers of tokens and types are small
        if node in taken and node.meta["val"].is_floating_point():
            found |= _made(program, node, taken - {node}) or set()
    return frozenset(found)


def _made(program: Program, node: fx.Node, taken: set[fx.Node]) -> set[fx.Node] | None:
    """The operations from rows that are taken to ``node``; None where something else is needed."""
    made, todo = set[fx.Node](), [node]
    while todo:
        node = todo.pop()
        if node in made or node in taken:
            continue
        sources = [x for x, carried in reads(program, node) if carried]
        if not (sources and rule_for(node.target) and is_parallel(program, node)) or node in program.attending:
            return None
        made.add(node)
        todo += sources
    return made
