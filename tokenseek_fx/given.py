"""Rows that the user selects: ``with tokenseek_fx.selecting(indices): ...``."""

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
    """Indices or weights of ``selecting`` are malformed, or don't fit the batch."""


@dataclass(eq=False)
class Given:
    """The rows for the forwards inside one ``selecting``.

    ``indices``: int64 [B, k]. ``weights``: float [B, k]. ``last``: the highest index. ``used``: a graph used the rows.
    ``weighed``: a loss used the weights. For values that pass from one graph of a model to the next: ``places``: their
    batch and token dims; ``parallel``: candidates for their token dim, if the graph that returned them has no attention
    and is row-wise along these dims only.
    """

    indices: Tensor
    weights: Tensor | None
    last: int
    used: bool = False
    weighed: bool = False
    places: MutableMapping[Tensor, RowPlace] = field(default_factory=WeakTensorKeyDictionary)
    parallel: MutableMapping[Tensor, frozenset[int]] = field(default_factory=WeakTensorKeyDictionary)

    def passed(self, values: Sequence[Any]) -> tuple[tuple[int, RowPlace], ...]:
        """(index, batch and token dims) of the values whose dims are known."""
        return tuple((i, self.places[x]) for i, x in enumerate(values) if isinstance(x, Tensor) and x in self.places)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.indices,) if self.weights is None else (self.indices, self.weights)

    @property
    def named(self) -> dict[str, Tensor]:
        return dict(zip(("indices", "weights"), self.tensors, strict=False))

    def check_fits(self, batch: int, tokens: int, device: torch.device) -> None:
        """Raise ``SelectionError`` if the rows don't fit a batch of this size, length and device."""
        if self.indices.shape[0] != batch:
            raise SelectionError(
                f"selecting: indices are for {self.indices.shape[0]} sequences, but the batch has {batch}. "
                "Pass a row of indices for each sequence."
            )
        if self.last >= tokens:
            raise SelectionError(
                f"selecting: index {self.last} is out of range: a sequence has {tokens} tokens. Indices count from 0."
            )
        if self.indices.device != device:
            raise SelectionError(
                f"selecting: indices are on {self.indices.device}, but the model is on {device}. Move the indices."
            )

    def warn_of_no_use(self) -> None:
        """Warn if the rows or the weights had no effect."""
        if not self.used:
            _warn(
                "no rows were selected, since no graph compiled for training ran inside the context. "
                "Run a training forward of a compiled model in it"
            )
        elif self.weights is not None and not self.weighed:
            _warn(
                "the weights had no effect, since no loss in the compiled graphs uses them. "
                "Apply them to the loss that you compute outside"
            )


@contextmanager
def selecting(indices: Tensor, weights: Tensor | None = None) -> Iterator[None]:
    """Train on these rows in all forwards inside the context, in this thread, of any model compiled with this backend.

    All graphs of a model that Dynamo split, and all modules that are compiled separately, use the same rows.

    Args:
        indices: int64 [B, k], the kept positions of each sequence, strictly increasing.
        weights: float [B, k], one factor for the loss of each kept token (``Selection.weights``).

    Raises:
        SelectionError: indices or weights are malformed; from the forward: they don't fit the batch.
        GraphNotSupported: from the forward: a graph can't be rewritten exactly for these rows.

    Warns:
        TokenSeekWarning: the rows or the weights had no effect.

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
        raise SelectionError(
            "selecting: expected indices int64 [B, k], at least 0 and strictly increasing in each sequence."
        )
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.shape != indices.shape:
        raise SelectionError("selecting: expected weights float [B, k], one for each index.")
    if weights.requires_grad:
        raise SelectionError("selecting: weights can't require grad. Detach them.")


def _warn(fact: str) -> None:
    warnings.warn(f"tokenseek: selecting: {fact}.", TokenSeekWarning, stacklevel=4)
