"""Linear head: the operations from the input of a linear head to a loss over labels.

The fused head of ``ops/head.py`` computes them if they have this form:

    hidden -> linear (or a product with a transposed weight)
           -> factors, one soft cap, casts, views that keep all rows -> loss
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

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
    """A linear head and its loss over labels.

    The logits are ``scale * softcap * tanh(x / softcap)``, or ``scale * x`` if ``softcap`` is 0.

    Args:
        loss: the loss operation.
        nodes: the operations of the head, the product first, without the loss.
        hidden: the input of the head.
        weight: [V, D], or [D, V] if ``transposed``.
        bias: [V] or ``None``.
        transposed: whether the weight is transposed.
        scale: factor of the logits.
        softcap: soft cap of the logits; 0: none.
        product: dtype of the product.
        dtype: dtype of the logits in the loss.
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
        """Compute losses and their gradient at the input of the head.

        Returns:
            The losses of the rows, the rows of ``hidden``, and the gradient of the sum of the losses there (empty
            unless ``gradient``).
        """
        hidden = streams.rows(self.hidden, streams.axes.row_dim(self.hidden))
        rows, *others = self._operands(streams)
        losses, found = loss_of_head(rows.detach(), *others, self.softcap, self.scale, self.dtype, gradient)
        return losses, hidden, found.reshape(hidden.shape).to(hidden.dtype) if gradient else found

    def losses(self, streams: Streams) -> Tensor:
        """The losses of the rows, differentiable with respect to hidden, weight and bias."""
        with tagged(Kind.ROWS, self.nodes[0]):
            return head_loss(*self._operands(streams), self.softcap, self.scale, self.dtype, False)[0]

    def _operands(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
        """Hidden rows [N, D], weight [V, D], bias, targets, and the index of targets that are ignored."""
        call = RowOp(self.loss, streams, None)
        hidden = streams.rows(self.hidden, streams.axes.row_dim(self.hidden)).to(self.product)
        weight = streams.full(self.weight)
        weight = (weight.t() if self.transposed else weight).to(self.product)
        bias = None if self.bias is None else streams.full(self.bias).to(self.product)
        return hidden.reshape(-1, hidden.shape[-1]), weight, bias, call.own_rows(1), call["ignore_index"]


@disable_proxy_modes_tracing()  # sizes are compared, which is no step of the forward
def find_head(loss: fx.Node, rows: set[fx.Node], inside: set[fx.Node]) -> Head | None:
    """The linear head of ``loss``.

    Args:
        loss: a loss over labels.
        rows: the operations that may belong to the head.
        inside: the values that are differentiated; the input of the head must be one of them, weight and bias must not.

    Returns:
        ``None`` if other operations lead to the loss, or it has class weights, class probabilities or label smoothing.
    """
    given = bind(loss)
    way = list(_way_back(given["self"]))
    first = way[-1]
    soft = given["target"].meta["val"].is_floating_point()
    if soft or given["weight"] is not None or given.get("label_smoothing") or first.target not in _PRODUCTS:
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
    """From the logits of a loss back to the first operation that is no step of a head."""
    yield node
    while _is_step(node):
        node = node.all_input_nodes[0]
        yield node


def _is_step(node: fx.Node) -> bool:
    if node.target is aten.log_softmax.int:
        return bind(node)["dim"] in (-1, _value(node).ndim - 1)
    return node.target in (*_LAYOUT, aten.tanh.default) or _factor(node) is not None


def _factor(node: fx.Node) -> float | None:
    """c of an operation ``x * c`` (or ``x / c``), if c is a Python number; ``None`` otherwise."""
    by = node.args[1] if len(node.args) == 2 else None
    if not isinstance(by, (int, float)) or node.kwargs:
        return None
    if node.target in MULTIPLICATIONS:
        return by
    return 1 / by if node.target in DIVISIONS and by else None


def _factors(way: list[fx.Node]) -> tuple[float, float] | None:
    """(scale, softcap) of the operations after the product; ``None`` if they are not of this form."""
    found = [1.0]  # the factor outside the cap, then that inside it
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
    """True if the loss takes [N, V], and every step before it has the rows of the product."""
    whole = _value(way[-1])
    same = (
        same_size(x.shape[-1], whole.shape[-1]) and same_size(x.numel(), whole.numel()) and x.device == whole.device
        for x in map(_value, way)
    )
    return all(same) and _value(way[0]).ndim == 2 and _value(weight).ndim == 2


def _widen(dtypes: list[torch.dtype]) -> bool:
    """True if the logits are cast at most once, and to at least float32."""
    return len(dtypes) == 1 or (len(dtypes) == 2 and dtypes[1].itemsize >= 4)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]
