"""See what was selected: ``with tokenseek_fx.record() as rec: ...``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_recordings: ContextVar[tuple[Recording, ...]] = ContextVar("tokenseek_recordings", default=())


@dataclass(frozen=True)
class Selection:
    """The tokens one forward kept. ``indices``: [B, k] int64, sorted. ``scores``: [B, T] float, the highest were kept."""

    indices: torch.Tensor
    scores: torch.Tensor


class Recording(list[Selection]):
    """The selections of the forwards under ``record()``, in order."""


@contextmanager
def record() -> Iterator[Recording]:
    """Collect a ``Selection`` for every training forward run under it in this thread, by any compiled model.

    Recordings nest; each thread has its own (as with ``torch.no_grad``). Nothing is kept when none is open.

    >>> with record() as rec:
    ...     pass  # model(**batch).loss.backward()
    >>> len(rec)
    0
    """
    recording = Recording()
    token = _recordings.set((*_recordings.get(), recording))
    try:
        yield recording
    finally:
        _recordings.reset(token)


def note(indices: torch.Tensor, scores: torch.Tensor) -> None:
    """Add a selection to the open recordings of this thread."""
    for recording in _recordings.get():
        recording.append(Selection(indices.detach().clone(), scores.detach().clone()))


def is_open() -> bool:
    """True when a recording is open in this thread."""
    return bool(_recordings.get())
