"""Eager attention: read an attention that a model writes out as matmul and softmax.

    softmax over keys of (cap(Q K^T scale) + mask | sinks) V,   cap(x) = softcap tanh(x / softcap)

Scores of all pairs of positions need not exist then (see ``positional``). The attention must have the form that models
use: nothing else reads the scores (no attention weights are returned), the softmax is as precise as the products, and
its result has no dropout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..analysis.attentions import Attention
from ..graph.factors import same_size
from ..graph.nodes import bind, is_tensor
from ..graph.op_sets import CASTS, DIVISIONS, MULTIPLICATIONS, SOFTMAX
from .mask_reader import read_hidden, read_mask
from .masks import Mask, both

aten = torch.ops.aten


@dataclass(frozen=True)
class Scores:
    """The operations from the product with the keys to the softmax.

    ``query`` [B, H, T, E] and ``key`` [B, H, S, E] (heads repeated), ``scale``, ``softcap`` (0: none), ``mask``,
    ``sinks`` (H numbers).
    """

    query: fx.Node
    key: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    mask: Mask = field(default_factory=Mask)
    sinks: fx.Node | None = None


def read_scores(attention: Attention) -> Scores | None:
    """The scores of an eager attention; None if it does more than ``selected_attention`` can."""
    softmax, out = attention.node, attention.out
    if out.target is not aten.matmul.default or not _is_precise(softmax, out) or not _leads_to(softmax, out):
        return None
    found = _read(attention.scores)
    if found is None or (found.sinks is None) is not (attention.weights is softmax):
        return None
    if found.mask.keys and softmax.target not in SOFTMAX:  # fully masked queries have other values in other words
        return None
    queries, keys = (x.meta["val"].shape[2] for x in (found.query, found.key))
    return None if found.mask.window and not same_size(queries, keys) else found


def _is_precise(softmax: fx.Node, out: fx.Node) -> bool:
    """Whether the operator's softmax, in the dtype of the products or float32, is as precise as the model's."""
    dtype = softmax.meta["val"].dtype
    return torch.promote_types(dtype, out.meta["val"].dtype) is dtype


def _leads_to(softmax: fx.Node, out: fx.Node) -> bool:
    """Whether only ``out`` reads the softmax, as it is or without its last column."""
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if user is out:
            return node is out.args[0] and node is not out.args[1]
        if user.target not in CASTS and not _cuts_last(user):
            return False
        node = user
    return False


def _cuts_last(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    whole, part = node.args[0].meta["val"].shape, node.meta["val"].shape
    return not bind(node)["start"] and same_size(part[-1] + 1, whole[-1])


def _read(node: Any) -> Scores | None:
    """Read scores, from their last operation backwards."""
    rule = _RULES.get(node.target) if is_tensor(node) else None
    return None if rule is None else rule(node)


def _cast(node: fx.Node) -> Scores | None:
    return _read(node.args[0]) if node.meta["val"].is_floating_point() else None


def _shifted(node: fx.Node) -> Scores | None:
    """Scores minus their maximum, which leaves the softmax unchanged."""
    scores, top = node.args[:2]
    largest = top.args[0] if is_tensor(top) and top.target is operator.getitem and top.args[1] == 0 else top
    if not isinstance(largest, fx.Node) or largest.target not in (aten.max.dim, aten.amax.default):
        return None
    given, last = bind(largest), {-1, scores.meta["val"].ndim - 1}
    dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    is_row_wise = given["keepdim"] and len(dims) == 1 and {*dims} <= last
    return _read(scores) if is_row_wise and given["self"] is scores else None


def _beside_sinks(node: fx.Node) -> Scores | None:
    parts, dim = node.args[0], bind(node)["dim"]
    if len(parts) != 2 or dim not in (-1, node.meta["val"].ndim - 1):
        return None
    found, sinks = _read(parts[0]), parts[1]
    sinks = sinks.args[0] if sinks.target is aten.expand.default else sinks
    shape = sinks.meta["val"].shape
    if found is None or found.sinks or [*shape] != [1, found.query.meta["val"].shape[1], 1, 1]:
        return None
    return replace(found, sinks=sinks)


def _added(node: fx.Node) -> Scores | None:
    """Scores plus a mask, in either order."""
    left, right = node.args
    if not is_tensor(right) or bind(node)["alpha"] != 1:
        return None
    found = _read(left)
    return _masked(_read(right), read_mask(left)) if found is None else _masked(found, read_mask(right))


def _masked(found: Scores | None, mask: Mask | None) -> Scores | None:
    if found is None or mask is None or found.sinks:
        return None
    mask = both(found.mask, mask)
    return None if mask is None else replace(found, mask=mask)


def _filled(node: fx.Node) -> Scores | None:
    scores, hidden, value = node.args
    return _masked(_read(scores), read_hidden(hidden, value, node.meta["val"].dtype))


def _scaled(node: fx.Node) -> Scores | None:
    scores, number = node.args[:2]
    if not isinstance(number, (int, float)):
        return None
    if scores.target is aten.tanh.default and node.target in MULTIPLICATIONS:
        found = _read(scores.args[0])
        return _capped(found, float(number)) if found else None
    found = _read(scores)
    if found is None or found.softcap or found.mask != Mask() or found.sinks:
        return None
    return replace(found, scale=found.scale * number if node.target in MULTIPLICATIONS else found.scale / number)


def _capped(found: Scores, cap: float) -> Scores | None:
    """``cap`` times the tanh of scores divided by it. ``found.scale`` already has the division."""
    if found.softcap or found.mask != Mask() or found.sinks or cap <= 0:
        return None
    return replace(found, scale=found.scale * cap, softcap=cap)


def _product(node: fx.Node) -> Scores | None:
    query, turned = _operands(node)
    if turned.target is not aten.transpose.int or turned.meta["val"].ndim != 4 or query.meta["val"].ndim != 4:
        return None
    key, one, other = _operands(turned)
    return Scores(query, key) if {one % 4, other % 4} == {2, 3} else None


def _operands(node: fx.Node) -> tuple[Any, ...]:
    return node.args


_RULES: dict[Any, Callable[[fx.Node], Scores | None]] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys((*MULTIPLICATIONS, *DIVISIONS), _scaled),
    aten.sub.Tensor: _shifted,
    aten.cat.default: _beside_sinks,
    aten.add.Tensor: _added,
    aten.masked_fill.Scalar: _filled,
    aten.matmul.default: _product,
}
