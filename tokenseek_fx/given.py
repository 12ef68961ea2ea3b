"""Rows given from outside: ``with tokenseek_fx.selecting(indices): ...``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .passes.analysis.token_axes import RowPlace
from .passes.graph.errors import TokenSeekError
from .warnings import TokenSeekWarning

_given: ContextVar[Given | None] = ContextVar("tokenseek_given", default=None)


class SelectionError(TokenSeekError, ValueError):
    """Rows (or weights) given to ``selecting`` that are malformed, or that don't fit the batch."""


@dataclass(eq=False)
class Given:
    """The rows of the forwards under one ``selecting``. ``last``: the highest. ``used``: a graph took the rows.
    ``weighed``: a loss took the weights.

    Of values that pass from one graph of a model to the next: ``places``: their batch and token dims. ``parallel``: the dims of
    which one must be the token axis, as the graph that gave them has no attention and works by rows along those alone.
    """

    indices: Tensor
    weights: Tensor | None
    last: int
    used: bool = False
    weighed: bool = False
    places: MutableMapping[Tensor, RowPlace] = field(default_factory=WeakTensorKeyDictionary)
    parallel: MutableMapping[Tensor, frozenset[int]] = field(default_factory=WeakTensorKeyDictionary)

    def passed(self, values: Sequence[Any]) -> tuple[tuple[int, RowPlace], ...]:
        """The values whose batch and token dims are known, by position."""
        return tuple((i, self.places[x]) for i, x in enumerate(values) if isinstance(x, Tensor) and x in self.places)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.indices,) if self.weights is None else (self.indices, self.weights)

    @property
    def named(self) -> dict[str, Tensor]:
        return dict(zip(("indices", "weights"), self.tensors, strict=False))

    def check_fits(self, batch: int, tokens: int, device: torch.device) -> None:
        """Raise ``SelectionError`` where these are no rows of a batch."""
        if self.indices.shape[0] != batch:
            raise SelectionError(f"selecting: indices of {self.indices.shape[0]} sequences, but the batch has {batch}.")
        if self.last >= tokens:
            raise SelectionError(f"selecting: index {self.last}, but a sequence has {tokens} tokens.")
        if self.indices.device != device:
            raise SelectionError(f"selecting: indices on {self.indices.device}, but the model is on {device}.")

    def warn_of_no_use(self) -> None:
        """Tell where what was given had no effect."""
        if not self.used:
            _warn("no graph compiled for training ran under it, so no rows were selected")
        elif self.weights is not None and not self.weighed:
            _warn("no loss took the weights: weigh the one that is computed outside the compiled graphs yourself")


@contextmanager
def selecting(indices: Tensor, weights: Tensor | None = None) -> Iterator[None]:
    """Train on these rows in every forward under it in this thread, by any model compiled with this backend.

    All graphs of a model that Dynamo split, and all modules that are compiled each for itself, take the same rows.

    Args:
        indices: int64 [B, k], the kept positions of every sequence, strictly increasing.
        weights: float [B, k], one factor for the loss of every kept token (``Selection.weights``).

    Raises:
        SelectionError: malformed indices or weights; in the forward: they don't fit the batch.
        GraphNotSupported: in the forward: a graph can't be rewritten exactly for these rows.

    >>> with selecting(torch.tensor([[0, 3, 4]])):  # doctest: +SKIP
    ...     model(**batch).loss.backward()
    """
    _check(indices, weights)
    found = Given(*(None if x is None else x.contiguous() for x in (indices, weights)), last=int(indices[:, -1].max()))
    token = _given.set(found)
    try:
        yield
    finally:
        _given.reset(token)
    if torch.is_grad_enabled():
        found.warn_of_no_use()


def given() -> Given | None:
    """The rows of the innermost ``selecting`` of this thread."""
    return _given.get()


def _check(indices: Any, weights: Any) -> None:
    shaped = isinstance(indices, Tensor) and indices.dtype is torch.int64 and indices.ndim == 2 and indices.numel()
    if not shaped or bool((indices[:, 0] < 0).any() | (indices.diff(dim=1) <= 0).any()):
        raise SelectionError("selecting: expected indices int64 [B, k], from 0, strictly increasing in every sequence.")
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.shape != indices.shape:
        raise SelectionError("selecting: expected weights float [B, k], one for every index.")
    if weights.requires_grad:
        raise SelectionError("selecting: weights can't require grad.")


def _warn(fact: str) -> None:
    warnings.warn(f"tokenseek: selecting: {fact}.", TokenSeekWarning, stacklevel=4)
