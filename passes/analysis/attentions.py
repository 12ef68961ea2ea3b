"""Attentions: the attention operations of a graph, and each softmax whose result is multiplied with values.

A softmax over a dim is an attention if that dim, the *keys*, is contracted with values, and another dim, the
*queries*, remains in the product and is no dim of the values. Dims are followed from the softmax to the product, so
heads may be mixed and two softmaxes subtracted in between, and queries and keys may be any dims. ``normalised`` reads
the spellings of a softmax.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from ..graph.factors import Axes, Dim
from ..graph.nodes import bind, first_alike, is_tensor, operands_of
from ..graph.op_sets import CASTS, CONTRACTIONS, LAYOUT, MATMULS, MULTIPLICATIONS
from ..graph.program import Program
from ..rules.attention import attention_op
from .carried import ValueAxes, carried_dims, carried_from, carried_to, uses
from .normalised import Normalised, dim_of, normalised

aten = torch.ops.aten
_PRODUCTS = {*MATMULS, *CONTRACTIONS}
_WITH_BIAS = (aten.addmm.default, aten.baddbmm.default)
#: A value and one of its dims.
Place = tuple[fx.Node, int]


@dataclass(frozen=True)
class Attention:
    """One attention.

    Args:
        node: the attention operation, or the softmax of an eager attention.
        leading: the axes other than query and key (batch, heads).
        query: the axis of the query positions.
        key: the axis of the key positions.
        weights: the attention weights without the columns of attention sinks; for an attention operation, ``node``
            itself.
        out: the product of the attention weights and the values.
        dims: of an eager attention, the dims of ``weights`` with the queries and the keys.
        scores: of an eager attention, the operand of the softmax; None if its weights are no softmax of a value.
    """

    node: fx.Node
    leading: Axes
    query: Dim
    key: Dim
    weights: fx.Node
    out: fx.Node
    dims: tuple[int, int] = (-2, -1)
    scores: fx.Node | None = None


def attentions_in(program: Program, found: ValueAxes) -> Iterator[Attention]:
    """The attentions of a graph, in order."""
    inputs = zip(program.placeholders, program.inputs, strict=True)
    parameters = {node for node, value in inputs if isinstance(value, torch.nn.Parameter)}
    alike = first_alike(program.graph)
    for node in program.graph.nodes:
        operation, softmax = attention_op(node), normalised(node, alike)
        if operation is not None:
            query, key = found.axes[operation.query][0], found.axes[operation.key][0]
            yield Attention(node, query[:-2], query[-2], key[-2], node, node)
        elif softmax is not None:
            eager = _eager(node, softmax, found)
            if eager is not None and not _is_feature((eager.weights, eager.dims[0]), found, parameters):
                yield eager


def _eager(node: fx.Node, softmax: Normalised, found: ValueAxes) -> Attention | None:
    """The attention of a softmax; None if no product with values contracts its dim."""
    pending, seen = [((node, softmax.dim),)], {node}
    while pending and node.meta["val"].ndim >= 3:
        path = pending.pop(0)
        for user, operand in uses(path[-1][0]):
            to = _key_in(user, operand, path[-1], found)
            product = _product(user, operand, to, path[-1][1], found)
            if product is not None:
                return _attention(path, softmax.scores, *product, found)
            if to is not None and user not in seen:
                seen.add(user)
                pending.append((*path, (user, to)))
    return None


def _key_in(user: fx.Node, operand: int, place: Place, found: ValueAxes) -> int | None:
    """The dim of a user's result with the keys, also if it has fewer of them or they are normalised again."""
    to, (node, key) = carried_to(user, operand, place[1], found), place
    if to is not None or not is_tensor(user) or len(operands_of(user)) > 1:
        return to
    before, after = found.of(node), found.of(user)
    kept = len(before) == len(after) and (user.target is aten.slice.Tensor or before[key] == after[key])
    return key if kept else None


def query_dim(product: fx.Node, operand: int, key: int, found: ValueAxes) -> int | None:
    """The dim of attention weights that, in their product with values, only they have; None if it isn't one dim.

    Args:
        product: an operation that contracts ``key``.
        operand: the number of the operand with the attention weights.
        key: their dim with the keys.
    """
    operands, first = operands_of(product), int(product.target in _WITH_BIAS)
    if product.target not in CONTRACTIONS or operand < first or len(operands) < first + 2:
        return None
    if product.target is aten.einsum.default:
        return _alone(product, operand, key, found)
    rank = operands[operand].meta["val"].ndim
    dims = (rank - 2, rank - 1) if operand == first else (rank - 1, rank - 2)
    return dims[0] if rank > 1 and key == dims[1] else None


def _alone(product: fx.Node, operand: int, key: int, found: ValueAxes) -> int | None:
    """The one dim of an operand that the other operands lack; if there are several, the one on the axis of ``key``."""
    operands = operands_of(product)
    labels, own = found.of(operands[operand]), carried_dims(product, operand, found)
    of_others = {to for i in range(len(operands)) if i != operand for to in carried_dims(product, i, found)}
    alone = [dim for to, dim in own.items() if to not in of_others]
    alone = [dim for dim in alone if labels[dim] == labels[key]] or alone
    return alone[0] if len(alone) == 1 and of_others - {*own} else None


def _product(user: fx.Node, operand: int, to: int | None, key: int, found: ValueAxes) -> tuple[fx.Node, int] | None:
    """The product of weights with values in which ``user`` reads the weights, and their query dim.

    ``to``: the dim of the result with the keys; None: they are contracted.
    """
    if to is None:
        query = query_dim(user, operand, key, found)
        return None if query is None else (user, query)
    if user.target not in MULTIPLICATIONS or len(operands_of(user)) < 2:
        return None
    dims = ([to], [to - user.meta["val"].ndim])  # a broadcast product, summed over the keys
    total = next((x for x in user.users if x.target is aten.sum.dim_IntList and bind(x)["dim"] in dims), None)
    query = None if total is None else _alone(user, operand, key, found)
    return None if total is None or query is None else (total, query)


def _attention(
    path: Sequence[Place], scores: fx.Node | None, out: fx.Node, query: int, found: ValueAxes
) -> Attention | None:
    """The attention whose softmax leads along ``path`` to ``out``; ``query`` is a dim of the last value of the path."""
    queries: list[int | None] = [query]
    for (node, _), (user, _) in reversed([*pairwise(path)]):
        queries.insert(0, None if queries[0] is None else carried_from(user, node, queries[0], found))
    at = _last_cut(path)
    (weights, key), first = path[at], queries[at]
    if first is None:
        return None
    labels = found.axes[weights][0]
    leading = tuple(label for dim, label in enumerate(labels) if dim not in (first, key))
    return Attention(path[0][0], leading, labels[first], labels[key], weights, out, (first, key), scores)


def _last_cut(path: Sequence[Place]) -> int:
    """The place in the path where the columns of attention sinks have been cut; 0 if there are none."""
    last = 0
    for i, (node, key) in enumerate(path[1:], 1):
        if node.target is aten.slice.Tensor and dim_of(node) == key:
            last = i
        elif len(operands_of(node)) != 1 or (node.target in LAYOUT and node.target not in CASTS):
            break
    return last


def _is_feature(place: Place, found: ValueAxes, parameters: Set[fx.Node]) -> bool:
    """True if a dim holds features, made by a weight, as in the softmax of linear attention over its keys."""
    node, dim = place
    while node.op == "call_function":
        if node.target is operator.getitem:
            node = node.all_input_nodes[0]
            continue
        operands = operands_of(node)
        carriers = {i: at for i in range(len(operands)) if (at := found.carried(node, i, dim)) is not None}
        weight = 1 + (node.target in _WITH_BIAS)
        if node.target in _PRODUCTS:
            return weight in carriers and _unmoved(operands[weight]) in parameters
        if not carriers and len(operands) == 1 and len(found.of(operands[0])) == len(found.of(node)):
            carriers[0] = dim  # a part of the features
        data = [i for i in carriers if _unmoved(operands[i]) not in parameters]
        if not data:
            return False
        node, dim = operands[data[0]], carriers[data[0]]
    return False


def _unmoved(node: fx.Node) -> fx.Node:
    """The value before changes of layout and dtype."""
    while node.target in LAYOUT or node.target in CASTS:
        node = node.all_input_nodes[0]
    return node


def scores_of(attention: Attention, found: ValueAxes) -> set[fx.Node]:
    """The values between the product with the keys and the product with the values."""
    key, scores, pending = found.space.resolve(attention.key), set(), [attention.node]
    while pending:
        node = pending.pop()
        scores.add(node)
        near = [user for user in node.users if user.target not in CONTRACTIONS]
        near += [] if node.target in CONTRACTIONS else operands_of(node)
        pending += [other for other in near if _is_score(other, key, found) and other not in scores]
    return scores


def _is_score(node: fx.Node, key: Dim, found: ValueAxes) -> bool:
    """True for a computed value of keys; a mask of tokens is no score."""
    is_computed = node.op == "call_function" and is_tensor(node) and node.meta["val"].is_floating_point()
    return is_computed and key in found.of(node)
