"""See what was selected: ``with tokenseek_fx.record() as rec: ...``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_recordings: ContextVar[tuple[Recording, ...]] = ContextVar("tokenseek_recordings", default=())


@dataclass(frozen=True)
class Selection:
    """The tokens one forward kept, and what was computed to choose them (``None``: it was not).

    ``indices``: [B, k] int64, sorted. ``scores``: [B, T] float, -inf for padding. ``weights``: [B, k] float, of the kept
    tokens in the loss. Of every token, [B, T]: ``attention`` received (I1), ``gradient`` (I2), ``loss``, ``labelled`` (bool).
    ``instances``: [B] int64, a fingerprint of each sequence's token ids, by which its visits are known again. ``others``: the
    selections on further token axes (the encoder's tokens of an encoder-decoder).
    """

    indices: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    labelled: torch.Tensor | None = None
    instances: torch.Tensor | None = None
    others: tuple[Selection, ...] = ()


class Recording(list[Selection]):
    """The selections of the forwards under ``record()``, in order. A notebook shows its statistics."""

    def _repr_html_(self) -> str:
        from .report.notebook import recording_html

        return recording_html(self)


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


def note(selected: Mapping[str, torch.Tensor], *others: Mapping[str, torch.Tensor]) -> None:
    """Add a selection, by the fields of ``Selection``, to the open recordings of this thread; ``others``: its ``others``."""
    for recording in _recordings.get():
        recording.append(selection(selected, *others))


def selection(selected: Mapping[str, torch.Tensor], *others: Mapping[str, torch.Tensor]) -> Selection:
    """A ``Selection`` of copies."""
    copies = {name: value.detach().clone() for name, value in selected.items()}
    return Selection(**copies, others=tuple(selection(other) for other in others))


def is_open() -> bool:
    """True when a recording is open in this thread."""
    return bool(_recordings.get())
