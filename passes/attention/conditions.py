"""Conditions: a boolean expression of one query and one key, taken apart into what ``Mask`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from ..graph.nodes import bind
from .masks import INSTANCE, KEY, QUERY, Mask

aten = torch.ops.aten
Meaning = Any


_ORDERS = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)


def mask_of_condition(meaning: Meaning, nodes: Mapping[Any, fx.Node]) -> Mask | None:
    """What a condition on one query and one key says."""
    found: Mask | None = Mask()
    parts = sorted(sympy.And.make_args(meaning), key=lambda part: not isinstance(part, sympy.Eq))
    orders = [part for part in parts if isinstance(part, _ORDERS) and not part.atoms(AppliedUndef)]
    for part in parts:
        if part not in orders:
            found = found and _with_part(found, part, nodes)
    return found and _with_order(found, orders)


def _with_part(mask: Mask, part: Meaning, nodes: Mapping[Any, fx.Node]) -> Mask | None:
    """``mask`` and one more condition, where that can be said."""
    if part == sympy.true:
        return mask
    if part.is_Function and _is_by_key(part):
        return replace(mask, keys=(*mask.keys, (nodes[part.func], part.args)))
    if isinstance(part, sympy.Eq) and not mask.segments:
        return _with_segments(mask, part, nodes)
    return _with_packed_order(mask, part, nodes) if isinstance(part, sympy.Le) else None


def _is_by_key(part: Meaning) -> bool:
    return KEY in part.args and all(arg in (INSTANCE, KEY) or arg.is_Integer for arg in part.args)


def _with_segments(mask: Mask, part: sympy.Eq, nodes: Mapping[Any, fx.Node]) -> Mask | None:
    left, right = part.args
    by_key = right if right.is_Function and _is_by_key(right) else left
    other = left if by_key is right else right
    if not (by_key.is_Function and _is_by_key(by_key) and other == by_key.subs(KEY, QUERY)):
        return None
    return replace(mask, segments=((nodes[by_key.func], by_key.args),))


def _with_packed_order(mask: Mask, part: Any, nodes: Mapping[Any, fx.Node]) -> Mask | None:
    """Positions that the batch gives, compared within segments that end wherever the next position is not one more."""
    given = nodes.get(getattr(part.lhs, "func", None))
    ordered = _is_by_key(part.lhs) and part.rhs == part.lhs.subs(KEY, QUERY)
    if given is None or not ordered or not mask.segments:
        return None
    number = mask.segments[0][0]  # cumsum(diff(positions) != 1)
    ends = number.args[0] if _is_along_last(number, aten.cumsum.default) else None
    steps = ends.args[0] if ends is not None and ends.target is aten.ne.Scalar and ends.args[1] == 1 else None
    is_diff = steps is not None and _is_along_last(steps, aten.diff.default) and bind(steps)["n"] == 1
    return replace(mask, causal=True) if is_diff and steps.args[0] is given else None


def _is_along_last(node: fx.Node, target: Any) -> bool:
    return node.target is target and bind(node)["dim"] in (-1, node.meta["val"].ndim - 1)


def _with_order(mask: Mask, parts: Sequence[Any]) -> Mask | None:
    """``mask`` and comparisons of the positions of query and key: causal, a window to both sides, or both."""
    ahead, behind = (sympy.S.Zero if mask.causal else sympy.oo), sympy.oo
    for difference in chain.from_iterable(map(_differences, parts)):
        forward, backward = (sympy.expand(difference - x) for x in (KEY - QUERY, QUERY - KEY))
        if forward.is_Integer:
            ahead = min(ahead, -forward)  # k - q is at most that
        elif backward.is_Integer:
            behind = min(behind, -backward)
        else:
            return None
    if behind < 0 or not (ahead == 0 or ahead == behind):
        return None
    return replace(mask, causal=bool(ahead == 0), window=0 if behind == sympy.oo else int(behind) + 1)


def _differences(part: Any) -> list[Meaning]:
    """What is at most 0 where an order of integers holds; a distance is two differences."""
    sides: tuple[Any, Any] = (part.lhs, part.rhs) if isinstance(part, (sympy.Le, sympy.Lt)) else (part.rhs, part.lhs)
    difference = sympy.expand(sides[0] - sides[1] + (1 if isinstance(part, (sympy.Lt, sympy.Gt)) else 0))
    distances: list[Any] = [*difference.atoms(sympy.Abs)]
    if len(distances) != 1 or difference.coeff(distances[0]) != 1:
        return [difference]
    (distance,) = distances[0].args
    rest = difference - distances[0]
    return [rest + distance, rest - distance]
