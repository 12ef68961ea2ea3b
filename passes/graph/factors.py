"""Factors: the algebra of axes. A dim is an ordered product of factors, and operations equate factors.

A *factor* is a variable with a size. A *dim* is a tuple of factors (row-major, outermost first); a dim of size 1 is the
empty product. Views regroup factors without renaming them, as in einops. Every other operation equates dims
(union-find). Sizes only decide how a view regroups factors, as row-major order defines; two dims of equal size are
never assumed to be the same axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch.fx.experimental.symbolic_shapes import statically_known_true

from .nodes import hint

Dim = tuple[int, ...]
Axes = tuple[Dim, ...]


def same_size(a, b) -> bool:
    """True if two sizes (int or SymInt) are known to be equal without adding a guard."""
    return statically_known_true(a == b)


def guarded_same_size(a, b) -> bool:
    """True if two sizes are equal for the example inputs; symbolic sizes get a guard."""
    return same_size(a, b) or (hint(a) == hint(b) and bool(a == b))


def divides(a, b) -> bool:
    """True if ``b`` is known to be a multiple of ``a``."""
    return statically_known_true(b % a == 0)


class Space:
    """The factors of one graph: union-find, where a factor may also be defined as a product of others.

    >>> space = Space()
    >>> batch, tokens = space.fresh(2), space.fresh(6)
    >>> flat = space.regroup((batch, tokens), [12])[0]
    >>> flat == batch + tokens
    True
    >>> windows = space.regroup((tokens,), [3, 2])   # splits the token factor in every value that has it
    >>> space.resolve(flat) == batch + windows[0] + windows[1]
    True
    """

    def __init__(self) -> None:
        self._sizes: list = []
        self._meaning: dict[int, Dim] = {}
        self._parts: dict[int, Dim] = {}
        self._mixtures: list[Dim] = []

    def fresh(self, size) -> Dim:
        """Create a dim with a new factor of this size; the empty dim for size 1."""
        if same_size(size, 1):
            return ()
        self._sizes.append(size)
        return (len(self._sizes) - 1,)

    def fresh_axes(self, shape: Sequence) -> Axes:
        return tuple(self.fresh(size) for size in shape)

    def fresh_part(self, size, whole: Dim) -> Dim:
        """Create a dim for some positions of ``whole`` (a slice, a top-k): another axis, recorded as a part of it."""
        dim = self.fresh(size)
        self._parts.update(dict.fromkeys(dim, whole))
        return dim

    def fresh_mixture(self, size) -> Dim:
        """Create a dim whose positions each combine several positions of another dim (a convolution)."""
        dim = self.fresh(size)
        self._mixtures.append(dim)
        return dim

    @property
    def mixtures(self) -> set[int]:
        """The root factors of all dims made by ``fresh_mixture``."""
        return {root for dim in self._mixtures for root in self.resolve(dim)}

    def parts_of(self, dim: Dim) -> set[int]:
        """The root factors of all parts of ``dim``, at any depth, without the factors of ``dim`` itself."""
        inside = set(self.resolve(dim))
        found: set[int] = set()
        for part, whole in self._parts.items():
            if (inside | found) & set(self.resolve(whole)):
                found |= set(self.resolve((part,)))
        return found - inside

    def resolve(self, dim: Dim) -> Dim:
        """The dim in terms of root factors."""
        if not any(f in self._meaning for f in dim):
            return dim
        return tuple(root for f in dim for root in (self.resolve(self._meaning[f]) if f in self._meaning else (f,)))

    def size(self, dim: Dim):
        """The size of a dim: the product of its factors' sizes."""
        return prod(self._sizes[f] for f in dim)

    def equate(self, left: Dim, right: Dim) -> None:
        """State that two dims are the same axis. Factors that can't be aligned stay distinct."""
        while True:
            left, right = self._strip_common(self.resolve(left), self.resolve(right))
            aligned = left and right and (self._equate_first(left[0], right[0]) or self._equate_several(left, right))
            if not aligned:
                return

    @staticmethod
    def _strip_common(left: Dim, right: Dim) -> tuple[Dim, Dim]:
        n = 0
        while n < min(len(left), len(right)) and left[n] == right[n]:
            n += 1
        return left[n:], right[n:]

    def _equate_first(self, a: int, b: int) -> bool:
        """Equate the outermost factors of two dims; False if their sizes don't align.

        Symbolic sizes that Dynamo has not equated (ids and labels have symbols of their own) are compared by a guard.
        """
        size_a, size_b = self._sizes[a], self._sizes[b]
        if guarded_same_size(size_a, size_b):
            self._meaning[b] = (a,)
        elif divides(size_a, size_b):
            self._split(b, size_a)
        elif divides(size_b, size_a):
            self._split(a, size_b)
        else:
            return False
        return True

    def _equate_several(self, left: Dim, right: Dim) -> bool:
        """Equate the outermost factor of one dim with several factors of the other, by a guard; False if none fit."""
        for one, others in ((right[0], left), (left[0], right)):
            for n in range(2, len(others) + 1):
                if guarded_same_size(self.size(others[:n]), self._sizes[one]):
                    self._meaning[one] = others[:n]
                    return True
        return False

    def _split(self, factor: int, head) -> tuple[int, int]:
        """Define ``factor`` as ``(head, tail)`` in every value that has it."""
        (outer,), (inner,) = self.fresh(head), self.fresh(self._sizes[factor] // head)
        self._meaning[factor] = (outer, inner)
        return outer, inner

    def regroup(self, axes: Axes, shape: Sequence) -> Axes:
        """The axes of ``x.view(shape)`` for ``x`` with these axes. Factors that can't be followed become fresh ones."""
        pending = [f for dim in axes for f in self.resolve(dim)]
        result = [self._take(pending, size) for size in shape]
        return tuple(dim if dim is not None else self.fresh(size) for dim, size in zip(result, shape, strict=True))

    def _take(self, pending: list[int], size) -> Dim | None:
        """Remove factors from the front of ``pending`` that multiply to ``size``; None if there are no such factors."""
        taken: list[int] = []
        while not same_size(size, 1):
            if not pending:
                return None
            first = pending.pop(0)
            if divides(self._sizes[first], size):
                taken.append(first)
                size = size // self._sizes[first]
            elif divides(size, self._sizes[first]):
                outer, inner = self._split(first, size)
                taken.append(outer)
                pending.insert(0, inner)
                size = 1
            else:
                pending.clear()
        return tuple(taken)
