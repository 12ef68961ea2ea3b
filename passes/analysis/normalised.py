"""Softmax in its spellings: ``softmax``, ``exp(x) / sum(exp(x))``, ``exp(x - logsumexp(x))``, ``exp(log_softmax(x))``.

Any other value that is divided or multiplied by a pointwise function of its sum over a dim counts as one too: it names
the dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.nodes import bind, operands_of
from ..graph.op_sets import CASTS, DIVISIONS, LAYOUT, LOG_SOFTMAX, MULTIPLICATIONS, SOFTMAX

aten = torch.ops.aten
_L1 = aten.linalg_vector_norm.default


@dataclass(frozen=True)
class Normalised:
    """A value normalised over ``dim``: the softmax of ``scores``, or of no value of the graph (``None``)."""

    dim: int
    scores: fx.Node | None = None


def normalised(node: fx.Node, alike: Mapping[fx.Node, fx.Node]) -> Normalised | None:
    """Read a softmax in any of its spellings; ``alike``: the first node that computes the same value."""
    if node.target in SOFTMAX:
        return Normalised(dim_of(node), node.all_input_nodes[0])
    if node.target is aten.exp.default:
        return _exp_of_log_softmax(node.all_input_nodes[0], alike)
    if node.target not in (*DIVISIONS, *MULTIPLICATIONS) or len(operands_of(node)) < 2:
        return None
    above, below = operands_of(node)
    dim = _reduced_dim(below, above, aten.sum.dim_IntList, alike)
    if dim is not None and node.target in DIVISIONS and above.target is aten.exp.default:
        return Normalised(dim, above.all_input_nodes[0])
    dim = _summed_dim(below, above, alike)
    return None if dim is None else Normalised(dim)


def _exp_of_log_softmax(node: fx.Node, alike: Mapping[fx.Node, fx.Node]) -> Normalised | None:
    if node.target in LOG_SOFTMAX:
        return Normalised(dim_of(node), node.all_input_nodes[0])
    if node.target is not aten.sub.Tensor or len(operands_of(node)) < 2 or bind(node)["alpha"] != 1:
        return None
    scores, total = operands_of(node)
    dim = _reduced_dim(total, scores, aten.logsumexp.default, alike)
    return None if dim is None else Normalised(dim, scores)


def _reduced_dim(part: fx.Node, whole: fx.Node, reduction: Any, alike: Mapping[fx.Node, fx.Node]) -> int | None:
    """The dim over which ``part`` reduces ``whole``, if it broadcasts to ``whole`` along it."""
    part = part.all_input_nodes[0] if part.target is aten.expand.default else part
    added = bind(part)["dim"] % part.meta["val"].ndim if part.target is aten.unsqueeze.default else None
    part = part if added is None else part.all_input_nodes[0]
    dim = _dim_summed(part, reduction, whole, alike)
    return dim if dim is not None and bind(part)["keepdim"] is (added is None) and added in (None, dim) else None


def _summed_dim(part: fx.Node, whole: fx.Node, alike: Mapping[fx.Node, fx.Node]) -> int | None:
    """The dim over which a sum of ``whole``, followed by pointwise operations, gives ``part``."""
    pending, seen = [part], set[fx.Node]()
    while pending:
        part = pending.pop()
        reduction = _L1 if part.target is _L1 and bind(part)["ord"] == 1 else aten.sum.dim_IntList
        dim = _dim_summed(part, reduction, whole, alike)
        if dim is not None:
            return dim
        if part not in seen and (part.target in LAYOUT or part.target in CASTS or _is_pointwise(part)):
            pending += operands_of(part)
        seen.add(part)
    return None


def _dim_summed(node: fx.Node, reduction: Any, whole: fx.Node, alike: Mapping[fx.Node, fx.Node]) -> int | None:
    """The dim of ``reduction(whole, [dim])``; None if ``node`` is anything else."""
    if node.target is not reduction or alike[node.all_input_nodes[0]] is not alike[whole]:
        return None
    dims = bind(node)["dim"] or []
    return dims[0] % whole.meta["val"].ndim if len(dims) == 1 else None


def dim_of(node: fx.Node) -> int:
    """The argument ``dim`` as a non-negative number."""
    return bind(node)["dim"] % max(1, node.meta["val"].ndim)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())
