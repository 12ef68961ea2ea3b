"""Scores whose keys come before their queries: the dim of their rows.

A value's rows are those of its first token dim; but scores have the rows of their queries, in any layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from ..graph.nodes import is_tensor, operands_of
from ..graph.op_sets import CONTRACTIONS
from ..rules.attention import attention_op
from .attentions import Attention, query_dim
from .carried import ValueAxes, carried_dims, carried_from, carried_to, uses


def keys_first(graph: fx.Graph, attentions: Iterable[Attention], found: ValueAxes) -> dict[fx.Node, int]:
    """The query dim of all scores whose keys come first.

    Scores carry both dims of the weights of some attention, or of other scores that are multiplied with values.
    """
    rows, seen = dict[fx.Node, int](), set[fx.Node]()
    eager = [a for a in attentions if attention_op(a.node) is None]
    pending = [*_without_softmax(graph, found)]
    pending += [(node, *a.dims) for a in eager for node in (a.weights, a.scores) if node is not None]
    while pending:
        node, query, key = pending.pop()
        if node in seen or not _depends_on_queries(node, query, found):
            continue
        seen.add(node)
        if key < query:
            rows[node] = query
        for user, i in uses(node):
            to_query, to_key = (carried_to(user, i, dim, found) for dim in (query, key))
            if to_query is not None and to_key is not None:
                pending.append((user, to_query, to_key))
        for operand in dict.fromkeys(node.all_input_nodes):
            from_query, from_key = (carried_from(node, operand, dim, found) for dim in (query, key))
            if from_query is not None and from_key is not None:
                pending.append((operand, from_query, from_key))
    return rows


def _without_softmax(graph: fx.Graph, found: ValueAxes) -> Iterator[tuple[fx.Node, int, int]]:
    """Values with two token dims that are multiplied with values of one, with their dims of queries and keys."""
    for node in graph.nodes:
        operands = operands_of(node) if node.target in CONTRACTIONS else []
        tokens = [found.token_dims(operand) for operand in operands]
        for i, dims in enumerate(tokens):
            keys = [*{*dims}.difference(carried_dims(node, i, found).values())]
            if len(dims) != 2 or len(keys) != 1 or any(len(others) > 1 for others in tokens[:i] + tokens[i + 1 :]):
                continue
            query = query_dim(node, i, keys[0], found)
            if query is not None and query in dims:
                yield operands[i], query, keys[0]


def _depends_on_queries(node: fx.Node, query: int, found: ValueAxes) -> bool:
    """False for numbers without gradient, and for terms of the scores made of keys alone, whose queries are indices."""
    if is_tensor(node) and not node.meta["val"].is_floating_point():
        return False
    carriers = [x for i, x in enumerate(operands_of(node)) if found.carried(node, i, query) is not None]
    return not carriers or any(x.meta["val"].is_floating_point() for x in carriers)
