"""Attentions: the attention operations of a graph, and the softmaxes whose result is multiplied with values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from ..graph.factors import Axes, Dim, Space
from ..graph.nodes import is_tensor, operands_of
from ..graph.op_sets import CONTRACTIONS, SOFTMAX
from ..rules.attention import attention_op

aten = torch.ops.aten


class ValueAxes(Protocol):
    """The axes of every value, as ``TokenAxes`` has them."""

    @property
    def space(self) -> Space: ...

    @property
    def axes(self) -> Mapping[fx.Node, tuple[Axes, ...]]: ...

    def of(self, node: fx.Node) -> Axes:
        """The axes of a value in root factors."""
        ...


@dataclass(frozen=True)
class Attention:
    """One attention.

    Args:
        node: the attention operation, or the softmax of an eager attention.
        leading: the axes before query and key (batch, heads).
        query: the axis of the query positions.
        key: the axis of the key positions.
        weights: the attention weights [*leading, query, key] without the columns of attention sinks; for an attention
            operation, ``node`` itself.
        out: the product of the attention weights and the values.
    """

    node: fx.Node
    leading: Axes
    query: Dim
    key: Dim
    weights: fx.Node
    out: fx.Node


def attentions_in(graph: fx.Graph, found: ValueAxes) -> Iterator[Attention]:
    """The attentions of a graph, in order."""
    for node in graph.nodes:
        operation = attention_op(node)
        if operation is not None:
            query, key = found.axes[operation.query][0], found.axes[operation.key][0]
            yield Attention(node, query[:-2], query[-2], key[-2], node, node)
        elif node.target in SOFTMAX and (reached := _contracted_with_values(node, found)) is not None:
            weights, out = reached
            dims = found.axes[weights][0]
            yield Attention(node, dims[:-2], dims[-2], dims[-1], weights, out)


def _contracted_with_values(node: fx.Node, found: ValueAxes) -> tuple[fx.Node, fx.Node] | None:
    """(attention weights, product with the values) of a softmax over the last dim; ``None`` if it is no attention."""
    rank = node.meta["val"].ndim
    return _contracted(node, node, found) if rank >= 3 and node.args[1] % rank == rank - 1 else None


def _contracted(node: fx.Node, weights: fx.Node, found: ValueAxes) -> tuple[fx.Node, fx.Node] | None:
    """Follow the softmax to its product with the values; return (attention weights, product).

    Operations on the way keep the last two dims, or slice the last dim (which removes the columns of sinks).
    """
    for user in node.users:
        if user.target in CONTRACTIONS and _left_operand(user) is node:
            return weights, user
        kept = is_tensor(user) and len(operands_of(user)) == 1 and found.of(user)[-2:] == found.of(node)[-2:]
        cut = user.target is aten.slice.Tensor and found.of(user)[:-1] == found.of(node)[:-1]
        reached = _contracted(user, weights if kept else user, found) if kept or cut else None
        if reached is not None:
            return reached
    return None


def scores_of(attention: Attention, found: ValueAxes) -> set[fx.Node]:
    """The values between the product with the keys and the product with the values."""
    key, scores, pending = found.space.resolve(attention.key), set(), [attention.node]
    while pending:
        node = pending.pop()
        scores.add(node)
        near = [user for user in node.users if user.target not in CONTRACTIONS]
        near += [] if node.target in CONTRACTIONS else operands_of(node)
        pending += [other for other in near if is_tensor(other) and other not in scores and key in found.of(other)]
    return scores


def _left_operand(node: fx.Node) -> fx.Node:
    return operands_of(node)[0]
