"""Masks: what a query may see, where that is a comparison of positions, so that no ``[T, T]`` tensor need exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import sympy
import torch
from torch import Tensor, fx

Index = tuple[Any, ...]

INSTANCE, HEAD, QUERY, KEY = sympy.symbols("b h q k", integer=True, nonnegative=True)


class Hides(Enum):
    """How keys are hidden."""

    WHOLLY = 0  # a query that sees none gets 0
    BY_VALUE = 1  # scores become the least finite number: it gets the mean of all values
    BY_SUM = 2  # that is added to scores: it gets the mean, and the scores get gradient through the sum


@dataclass(frozen=True)
class Mask:
    """What a query at position q may see: the key at position k where k <= q (``causal``), abs(q - k) < ``window`` (0: any), all of
    ``keys`` are True and all of ``segments`` are equal at q and k. Those are nodes with the positions that they are read at.
    ``added``: a mask that is alike for all queries, as it is ([..., 1, S] of a node). ``hides``: what a query that sees no key gets."""

    causal: bool = False
    window: int = 0
    keys: tuple[tuple[fx.Node, Index], ...] = ()
    segments: tuple[tuple[fx.Node, Index], ...] = ()
    added: fx.Node | None = None
    hides: Hides = Hides.WHOLLY

    def visible(self, values: Mapping[fx.Node, Any]) -> Tensor | None:
        """The mask of the keys, [B or 1, 1 or H, 1, S]: bool, or what is added to scores (``None``: all are visible)."""
        shown = self._shown(values)
        if self.added is None:
            return None if shown is None else shown[:, None, None]
        added = values[self.added][..., :1, :]
        added = added[(None,) * (4 - added.ndim)]
        if shown is None:
            return added
        shown, hidden = shown[:, None, None], False if added.dtype is torch.bool else -torch.inf
        return torch.where(shown, added, hidden)

    def fully_masked(self, values: Mapping[fx.Node, Any], positions: Tensor) -> Tensor | None:
        """True for queries at ``positions`` [B, k] that see no key and get the mean of all values, [B, k]; ``None``: there is no such query."""
        if self.hides is Hides.WHOLLY:
            return None
        shown = self._shown(values)
        if shown is None:
            mask = self.visible(values)
            assert mask is not None
            return (mask == torch.finfo(mask.dtype).min).flatten(1).all(1, keepdim=True).expand_as(positions)
        before = shown.cumsum(-1).expand(len(positions), -1)  # with the key itself
        ends = positions if self.causal else positions + (self.window or shown.shape[-1]) - 1
        seen = before.gather(1, ends.clamp(max=shown.shape[-1] - 1))
        if self.window:
            first = positions - self.window
            seen = seen - before.gather(1, first.clamp(min=0)).where(first >= 0, 0)
        return seen == 0

    def _shown(self, values: Mapping[fx.Node, Any]) -> Tensor | None:
        """True for the visible ones of the keys, [B or 1, S]."""
        found = None
        for node, index in self.keys:
            shown = _by_key(values[node], index)
            found = shown if found is None else found & shown
        return found

    def segments_of(self, values: Mapping[fx.Node, Any]) -> Tensor | None:
        """[B or 1, S] (``None``: all is one segment)."""
        return None if not self.segments else _by_key(values[self.segments[0][0]], self.segments[0][1])


def _by_key(value: Tensor, index: Index) -> Tensor:
    """A value that is read at ``index`` as [B or 1, S]."""
    for dim in reversed(range(len(index))):
        if index[dim] not in (INSTANCE, KEY):
            value = value.select(dim, int(index[dim]))
    return value if INSTANCE in index else value[None]


def both(one: Mask, other: Mask) -> Mask | None:
    """What is seen by both masks. That two hide keys can't be said: where both do, the sum of their numbers tells a query that sees nothing
    which keys it looks at. So one of them is nothing, or a bias that no input can make hide anything."""
    if one == Mask() or other == Mask():
        return other if one == Mask() else one
    bias, rest = (one, other) if one.added is not None else (other, one)
    if bias.added is None or rest.added is not None or not is_constant(bias.added):
        return None
    return replace(rest, added=bias.added)


def is_constant(node: fx.Node) -> bool:
    return node.op != "placeholder" and all(map(is_constant, node.all_input_nodes))
