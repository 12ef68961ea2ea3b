"""Visibility: which keys each query of an attention sees. One record, from reading a model's mask to the kernels.

A query at position p sees the key at position j if every condition of the record holds. Everything that computes
attention takes the record and asks it: the blocks of ATen operations, ``attention.definition``, ``received`` and the
launchers of the Triton kernels. The kernels compare positions themselves. To add a condition, extend this file, the
reader of masks (``passes/attention``) and the two files of kernels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from inspect import Parameter
from operator import and_
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Visibility:
    """Which keys each query sees; by default all. B: instances, H: heads, k: queries, S: keys.

    Args:
        mask: broadcastable to [B, H, k, S], bool (True: visible) or floating-point (added to the scores). It gets no
            gradient. Masks that are read from models are [B or 1, 1 or H, 1, S].
        segments: integers [B or 1, S]; a query sees only the keys of its own segment.
        fully_masked: bool [B, k], True for queries that see no key and get the mean of all values (see
            ``ops.fully_masked``). None: queries that see no key get 0.
        causal: a query sees key j only if j <= p.
        window: if positive, a query sees key j only if abs(p - j) < window.
        scored: the scores of the ``fully_masked`` queries, capped and scaled but not masked, get the gradient of a
            softmax whose weights are all 1 / S.
    """

    mask: Tensor | None = None
    segments: Tensor | None = None
    fully_masked: Tensor | None = None
    causal: bool = False
    window: int = 0
    scored: bool = False

    #: How many of the fields are tensors; they come first.
    TENSORS: ClassVar[int] = 3

    def flat(self) -> tuple[Any, ...]:
        """The fields in their order, as arguments of an operator (see ``with_flat_visibility``)."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> Visibility:
        """The record whose ``flat`` is this."""
        return cls(**dict(zip((field.name for field in fields(cls)), flat, strict=True)))

    def without_means(self) -> Visibility:
        """The same record, in which queries that see no key get 0."""
        return replace(self, fully_masked=None, scored=False)

    def expand(self, batch: int, keys: int) -> Visibility:
        """The same record with a mask [B, 1 or H, 1 or k, S] and segments [B, S], as views."""
        mask = None if self.mask is None else self.mask.expand(batch, -1, -1, keys)
        segments = None if self.segments is None else self.segments.expand(batch, -1)
        return replace(self, mask=mask, segments=segments)

    def at_keys(self, columns: Tensor) -> Visibility:
        """The same record with the mask of the keys at ``columns`` [B, m] only; it must be expanded."""
        if self.mask is None:
            return self
        return replace(self, mask=self.mask.gather(3, columns[:, None, None].expand(-1, *self.mask.shape[1:3], -1)))

    def of_instances(self, instances: slice) -> Visibility:
        """The same record for some instances; it must be expanded."""
        mask, segments = (x if x is None else x[instances] for x in (self.mask, self.segments))
        return replace(self, mask=mask, segments=segments)

    @property
    def by_position(self) -> bool:
        """Whether it depends on the positions of the queries."""
        return self.limits_reach or self.segments is not None

    @property
    def limits_reach(self) -> bool:
        """Whether positions alone hide keys, so that ``reach`` has a limit."""
        return self.causal or bool(self.window)

    @property
    def only_causal(self) -> bool:
        """Whether a query sees all keys up to its own position."""
        return self.causal and not self.window and self.mask is None and self.segments is None

    def reach(self, first: Any, last: Any) -> tuple[Any, Any]:
        """The positions of the first and the last key that queries at positions ``first`` to ``last`` may see.

        Ints or tensors, as given. They may lie outside of the keys. None: there is no such limit.
        """
        begin = first - self.window + 1 if self.window else None
        if self.causal:
            return begin, last
        return begin, last + self.window - 1 if self.window else None

    def visible(self, queries: Tensor | None, keys: Tensor) -> Tensor | None:
        """True where a query sees a key, as far as positions and segments say; the mask is left out.

        Args:
            queries: the positions of the queries, integers [B or 1, q]; None if not ``by_position``.
            keys: the positions of the keys, integers [B or 1, n].

        Returns:
            Bool [B or 1, q, n]; None if all queries see all keys.
        """
        if not self.by_position:
            return None
        assert queries is not None
        conditions, (p, j) = [], (queries[..., None], keys[:, None])
        if self.causal:
            conditions.append(j <= p)
        if self.window:
            conditions.append((j - p).abs() < self.window)
        if self.segments is not None:
            conditions.append(self._segments_at(queries)[..., None] == self._segments_at(keys)[:, None])
        return functools.reduce(and_, conditions)

    def _segments_at(self, positions: Tensor) -> Tensor:
        """The segments at ``positions`` [B or 1, n]."""
        assert self.segments is not None
        batch = torch.broadcast_shapes(self.segments.shape[:1], positions.shape[:1])
        return self.segments.expand(*batch, -1).gather(1, positions.expand(*batch, -1))

    def counts(self, shown: Tensor, positions: Tensor) -> Tensor:
        """How many of the keys that are True in ``shown`` queries may see by position, without segments.

        Args:
            shown: bool [B or 1, S].
            positions: int64 [B, k], the positions of the queries.

        Returns:
            int64 [B, k].
        """
        up_to = shown.cumsum(-1).expand(len(positions), -1)
        first, last = self.reach(positions, positions)
        whole = up_to[:, -1:].expand_as(positions)
        found = whole if last is None else up_to.gather(1, last.clamp(max=shown.shape[-1] - 1))
        if first is None:
            return found
        before = first - 1
        return found - up_to.gather(1, before.clamp(min=0)).where(before >= 0, 0)

    def constants(self) -> dict[str, Any]:
        """The constants (``tl.constexpr``) of a kernel. MASK: 0 for none, 1 for a bool mask, 2 for an additive one."""
        return {
            "CAUSAL": self.causal,
            "WINDOW": self.window > 0,
            "SEGMENTS": self.segments is not None,
            "MASK": 0 if self.mask is None else 1 if self.mask.dtype is torch.bool else 2,
        }

    def kernel_tensors(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and contiguous segments [B, S]; for None ``query`` as a placeholder, which kernels never read."""
        segments = query if self.segments is None else self.segments.expand(query.shape[0], -1).contiguous()
        return query if self.mask is None else self.mask, segments

    def mask_strides(self, query: Tensor, key: Tensor) -> tuple[Any, ...]:
        """The strides of the mask as [B, H, k, S]; 0 without a mask."""
        if self.mask is None:
            return 0, 0, 0, 0
        return self.mask.expand(*query.shape[:3], key.shape[2]).stride()


#: Every query sees all keys.
ALL_KEYS = Visibility()


def with_flat_visibility(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the fields of its last parameter, a ``Visibility``, as parameters of their own.

    Operators of ``torch.library`` take tensors and numbers only, and infer their schema from the signature.
    """
    signature = inspect.signature(function, eval_str=True)
    others, types = [*signature.parameters.values()][:-1], get_type_hints(Visibility)
    flat = [Parameter(f.name, Parameter.POSITIONAL_OR_KEYWORD, annotation=types[f.name]) for f in fields(Visibility)]

    @functools.wraps(function)
    def operator(*args: Any) -> Any:
        return function(*args[: len(others)], Visibility.from_flat(args[len(others) :]))

    operator.__signature__ = signature.replace(parameters=[*others, *flat])
    return operator
