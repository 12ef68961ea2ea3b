"""Head: the way from the input of a linear head to a loss over labels, where it is what ``ops/head.py`` computes.

hidden -> linear (or a product with a transposed weight) -> factors, one soft cap, casts, views that keep all rows -> loss
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from ...ops.head import head_loss, loss_of_head
from ..graph.factors import same_size
from ..graph.kinds import Kind, tagged
from ..graph.nodes import bind
from ..graph.op_sets import CASTS, DIVISIONS, MULTIPLICATIONS, VIEWS
from ..rows.row_op import RowOp, Streams

aten = torch.ops.aten
_LAYOUT = (*VIEWS, *CASTS, aten.flatten.using_ints, aten.slice.Tensor, aten.alias.default)
_PRODUCTS = (aten.linear.default, aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class Head:
    """A linear head and a loss over labels.

    ``nodes``: its operations, the product first, without the loss. ``weight``: [V, D], or [D, V] where ``transposed``.
    ``product``: dtype of the product; ``dtype``: that of the logits in the loss. The logits are
    ``scale * softcap * tanh(x / softcap)`` (``softcap`` 0: ``scale * x``).
    """

    loss: fx.Node
    nodes: tuple[fx.Node, ...]
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    scale: float
    softcap: float
    product: torch.dtype
    dtype: torch.dtype

    def run(self, streams: Streams, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of the rows; the rows of ``hidden``, and the gradient of the losses' sum there (empty without it)."""
        hidden = streams.rows(self.hidden, streams.axes.row_dim(self.hidden))
        rows, *others = self._operands(streams)
        losses, found = loss_of_head(rows.detach(), *others, self.softcap, self.scale, self.dtype, gradient)
        return losses, hidden, found.reshape(hidden.shape).to(hidden.dtype) if gradient else found

    def losses(self, streams: Streams) -> Tensor:
        """The losses of the rows, through which hidden, weight and bias get their gradient."""
        with tagged(Kind.ROWS, self.nodes[0]):
            return head_loss(*self._operands(streams), self.softcap, self.scale, self.dtype, False)[0]

    def _operands(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
        """Hidden rows [N, D], weight [V, D], bias, and the targets with what marks one that is none."""
        call = RowOp(self.loss, streams, None)
        hidden = streams.rows(self.hidden, streams.axes.row_dim(self.hidden)).to(self.product)
        weight = streams.full(self.weight)
        weight = (weight.t() if self.transposed else weight).to(self.product)
        bias = None if self.bias is None else streams.full(self.bias).to(self.product)
        return hidden.reshape(-1, hidden.shape[-1]), weight, bias, call.own_rows(1), call["ignore_index"]


def find_head(loss: fx.Node, rows: set[fx.Node], inside: set[fx.Node]) -> Head | None:
    """The head of ``loss``, all of it among ``rows``, its input among the values ``inside`` that are differentiated; ``None``
    where something else leads to the loss, or it has class weights or smoothes its labels."""
    given = bind(loss)
    way = list(_way_back(given["self"]))
    first = way[-1]
    if given["weight"] is not None or given.get("label_smoothing") or first.target not in _PRODUCTS:
        return None
    if loss.target is aten.nll_loss_nd.default and way[0].target is not aten.log_softmax.int:
        return None
    hidden, weight, bias = (*first.args, None)[:3]
    factors, dtypes = _factors(way), [dtype for dtype, _ in groupby(_value(node).dtype for node in reversed(way))]
    known = hidden in inside and weight not in inside and bias not in inside
    if not known or not {*way} <= rows or factors is None or not _are_logits(way, weight) or not _widen(dtypes):
        return None
    return Head(
        loss,
        tuple(reversed(way)),
        hidden,
        weight,
        bias,
        first.target is not aten.linear.default,
        *factors,
        dtypes[0],
        torch.promote_types(dtypes[-1], torch.float32),
    )


def _way_back(node: fx.Node) -> Iterator[fx.Node]:
    """From the logits of a loss back to the first operation that is not one of a head's."""
    yield node
    while _is_step(node):
        node = node.all_input_nodes[0]
        yield node


def _is_step(node: fx.Node) -> bool:
    if node.target is aten.log_softmax.int:
        return bind(node)["dim"] in (-1, _value(node).ndim - 1)
    return node.target in (*_LAYOUT, aten.tanh.default) or _factor(node) is not None


def _factor(node: fx.Node) -> float | None:
    """c of an operation ``x * c``, where it is a plain number."""
    by = node.args[1] if len(node.args) == 2 else None
    if not isinstance(by, (int, float)) or node.kwargs:
        return None
    if node.target in MULTIPLICATIONS:
        return by
    return 1 / by if node.target in DIVISIONS and by else None


def _factors(way: list[fx.Node]) -> tuple[float, float] | None:
    """(scale, softcap) of the operations after the product; ``None`` where they are not of this form."""
    found = [1.0]  # outside of the cap, inside of it
    for position, node in enumerate(way[:-1]):
        if node.target is aten.log_softmax.int and position > 0:
            return None
        if node.target is aten.tanh.default:
            found.append(1.0)
        found[-1] *= _factor(node) or 1.0
    if len(found) > 2 or not all(math.isfinite(x) and x for x in found):
        return None
    outside, inside = (*found, 0.0)[:2]
    return (outside * inside, 1 / inside) if inside else (outside, 0.0)


def _are_logits(way: list[fx.Node], weight: fx.Node) -> bool:
    """True where the loss takes [N, V], and every step before it has just the rows of the product."""
    whole = _value(way[-1])
    same = (
        same_size(x.shape[-1], whole.shape[-1]) and same_size(x.numel(), whole.numel()) and x.device == whole.device
        for x in map(_value, way)
    )
    return all(same) and _value(way[0]).ndim == 2 and _value(weight).ndim == 2


def _widen(dtypes: list[torch.dtype]) -> bool:
    """True where the logits are cast once at most, and not to less than float32."""
    return len(dtypes) == 1 or (len(dtypes) == 2 and dtypes[1].itemsize >= 4)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]
