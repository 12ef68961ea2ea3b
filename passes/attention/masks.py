"""Masks that compare positions: ``ops.visibility.Visibility`` before values exist, with nodes in place of tensors.

An attention with such a mask needs no ``[T, T]`` tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...ops.visibility import Visibility

Index = tuple[Any, ...]

INSTANCE, HEAD, QUERY, KEY = sympy.symbols("b h q k", integer=True, nonnegative=True)


class Hides(Enum):
    """How a mask hides keys, which decides what a query gets that sees no key."""

    WHOLLY = 0  # scores become -inf: 0
    BY_VALUE = 1  # scores become the least finite number: the mean of all values
    BY_SUM = 2  # that number is added to the scores: the mean, and the scores get gradient through the sum


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees, as in ``Visibility``; ``at`` gives it its values.

    Args:
        causal: a query at position q sees the key at position k only if k <= q.
        window: if positive, only if also abs(q - k) < window.
        keys: bool nodes with the indices that they are read at. A key is visible only if all of them are True.
        segments: at most one integer node with its index. A query sees only the keys of its own segment.
        added: the node of a mask [..., 1, S] that is the same for all queries: bool or added to the scores.
        hides: what a query gets that sees no key.
    """

    causal: bool = False
    window: int = 0
    keys: tuple[tuple[fx.Node, Index], ...] = ()
    segments: tuple[tuple[fx.Node, Index], ...] = ()
    added: fx.Node | None = None
    hides: Hides = Hides.WHOLLY

    @property
    def by_position(self) -> bool:
        """Whether it depends on the positions of the queries."""
        return self.causal or bool(self.window) or bool(self.segments)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that it reads."""
        added = () if self.added is None else (self.added,)
        return (*(node for node, _ in (*self.keys, *self.segments)), *added)

    def at(self, values: Mapping[fx.Node, Any], positions: Tensor | None = None) -> Visibility:
        """The visibility, where nodes have these values.

        ``positions`` [B, k] are those of the queries that get the mean of all values if they see no key. None: such
        queries get 0.
        """
        found = Visibility(
            mask=self.key_mask(values), segments=self._segments(values), causal=self.causal, window=self.window
        )
        if positions is None or self.hides is Hides.WHOLLY:
            return found
        fully_masked = self._fully_masked(values, positions, found)
        return replace(found, fully_masked=fully_masked, scored=self.hides is Hides.BY_SUM)

    def key_mask(self, values: Mapping[fx.Node, Any]) -> Tensor | None:
        """The mask of the keys, [B or 1, 1 or H, 1, S]: bool, or added to the scores. None: all keys are visible."""
        shown = self._shown(values)
        if self.added is None:
            return None if shown is None else shown[:, None, None]
        added = values[self.added][..., :1, :]
        added = added[(None,) * (4 - added.ndim)]
        if shown is None:
            return added
        shown, hidden = shown[:, None, None], False if added.dtype is torch.bool else -torch.inf
        return torch.where(shown, added, hidden)

    def _fully_masked(self, values: Mapping[fx.Node, Any], positions: Tensor, found: Visibility) -> Tensor:
        """True for queries at ``positions`` [B, k] that see no key, [B, k]."""
        shown = self._shown(values)
        if shown is not None:
            return found.counts(shown, positions) == 0
        mask = found.mask
        assert mask is not None
        return (mask == torch.finfo(mask.dtype).min).flatten(1).all(1, keepdim=True).expand_as(positions)

    def _shown(self, values: Mapping[fx.Node, Any]) -> Tensor | None:
        """True for visible keys, [B or 1, S]."""
        found = None
        for node, index in self.keys:
            shown = _by_key(values[node], index)
            found = shown if found is None else found & shown
        return found

    def _segments(self, values: Mapping[fx.Node, Any]) -> Tensor | None:
        """[B or 1, S]; None: there is one segment."""
        return None if not self.segments else _by_key(values[self.segments[0][0]], self.segments[0][1])


def _by_key(value: Tensor, index: Index) -> Tensor:
    """A value that is read at ``index``, as [B or 1, S]."""
    for dim in reversed(range(len(index))):
        if index[dim] not in (INSTANCE, KEY):
            value = value.select(dim, int(index[dim]))
    return value if INSTANCE in index else value[None]


def both(one: Mask, other: Mask) -> Mask | None:
    """Combine two masks: a query sees the keys that both show.

    None if both may hide keys: a fully masked query would look at keys by the sum of their two numbers. So one of them
    must be empty, or a constant that is added.
    """
    if one == Mask() or other == Mask():
        return other if one == Mask() else one
    bias, rest = (one, other) if one.added is not None else (other, one)
    if bias.added is None or rest.added is not None or not is_constant(bias.added):
        return None
    return replace(rest, added=bias.added)


def is_constant(node: fx.Node) -> bool:
    """Whether no input of the graph reaches this value."""
    return node.op != "placeholder" and all(map(is_constant, node.all_input_nodes))
