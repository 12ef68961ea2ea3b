"""Token-parallel values: along which dims of its outputs a graph computes each row independently.

A fragment of a model without attention does not name its token axis. If it is parallel along a dim, gradients that
reach only some rows stay in these rows, so the fragment needs no rewrite. The analysis is sound but not complete: an
operation without a rule is not parallel.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from ..analysis.activity import Activity
from ..analysis.routing import Routes
from ..analysis.token_axes import TokenAxes, TokenAxis, inferred
from ..attention.positional import PositionalAttentions
from ..graph.nodes import is_random, is_tensor, made_by, operands_of
from ..graph.op_sets import LOSSES
from ..graph.program import Program
from ..rules.attention import attention_op

#: Dim of an output -> position of a live input -> the dim of that input that its rows come from.
Sources = dict[int, dict[int, int]]


def parallel_dims(program: Program) -> dict[int, Sources]:
    """The parallel dims of every live output, by its position. Reads ``Activity``."""
    found, places = inferred(program), {node: i for i, node in enumerate(program.placeholders)}
    live = program[Activity].live
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
    """True if every row of the result depends on the same row of the operands with rows.

    At least one operand must have rows.
    """
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


def reads(program: Program, node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The tensors that a node of the seek stream reads, and whether it reads them row by row.

    One of several results reads the operands of the operation that returns it; the exit of a route reads the inputs of
    the route.
    """
    attention = program[PositionalAttentions].get(node)
    if attention is not None:
        yield attention.query, True
        yield from ((x, False) for x in attention.context)
        return
    axes, dim = program[TokenAxes], program[TokenAxes].row_dim(node) if is_tensor(node) else None
    if (route := program[Routes].to(node)) is not None:
        yield from ((x, axes.has_rows(x)) for x in route.inputs)
        return
    operation = made_by(node)
    for i, x in enumerate(operands_of(operation)):
        at = None if dim is None else axes.carried(operation, i, dim)
        yield x, at is not None and at in axes.token_dims(x)


def is_parallel(program: Program, node: fx.Node) -> bool:
    """True if a row of the result depends only on the same row of its operands, and is not random."""
    axes, operation = program[TokenAxes], made_by(node)
    target = operation.target
    if not isinstance(target, torch._ops.OpOverload) or not is_tensor(node) or not axes.has_rows(node):
        return False
    if node in program[PositionalAttentions]:
        return True
    if attention_op(operation) is not None or is_random(operation) or target in LOSSES:
        return False
    read = list(reads(program, node))
    carries = any(carried for _, carried in read) or not read  # rows of nothing that is carried are mixed positions
    return carries and all(carried or not axes.token_dims(x) for x, carried in read)
