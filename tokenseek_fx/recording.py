"""Record which tokens were selected: ``with tokenseek_fx.record() as rec: ...``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_recordings: ContextVar[tuple[Recording, ...]] = ContextVar("tokenseek_recordings", default=())


@dataclass(frozen=True)
class Selection:
    """The tokens that one forward kept, and the values computed to choose them (``None``: not computed).

    ``indices``: int64 [B, k], sorted, the kept positions. ``scores``: float [B, T], -inf for padding. ``weights``:
    float [B, k], the factors of the kept tokens in the loss. For each token, [B, T]: ``attention`` received (I1),
    ``gradient`` (I2) and ``loss``, float; ``labelled``, bool. ``instances``: int64 [B], a fingerprint of each
    sequence's token ids that identifies repeated visits. ``others``: the selections on further token axes (the
    encoder's tokens of an encoder-decoder).
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
    """The selections of the forwards inside ``record()``, in order. A notebook shows their statistics."""

    def _repr_html_(self) -> str:
        from .report.notebook import recording_html

        return recording_html(self)


@contextmanager
def record() -> Iterator[Recording]:
    """Collect a ``Selection`` for each training forward of any compiled model inside the context, in this thread.

    Recordings nest; each thread has its own (as with ``torch.no_grad``). Without an open recording nothing is stored.

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
    """Add a selection to the open recordings of this thread.

    ``selected``: the fields of ``Selection`` by name. ``others``: the same for further token axes.
    """
    for recording in _recordings.get():
        recording.append(selection(selected, *others))


def selection(selected: Mapping[str, torch.Tensor], *others: Mapping[str, torch.Tensor]) -> Selection:
    """A ``Selection`` of detached copies; arguments as in ``note``."""
    copies = {name: value.detach().clone() for name, value in selected.items()}
    return Selection(**copies, others=tuple(selection(other) for other in others))


def is_open() -> bool:
    """True if a recording is open in this thread."""
    return bool(_recordings.get())
