"""Registry: a table of rules by operation that rejects duplicate entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch

Entry = TypeVar("Entry")


class Registry(dict[Any, Entry], Generic[Entry]):
    """Entries by name or by operation.

    An operation is an ``OpOverload``, or ``"library::operation"`` for a library that may not be imported. ``kind``
    names the entries in error messages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, targets: Iterable[Any], entry: Entry) -> None:
        """Add an entry for every target.

        Raises:
            ValueError: a target has an entry already, or there are no targets.
        """
        targets = tuple(targets)
        if not targets:
            raise ValueError(f"{self.kind}: name at least one target.")
        for target in targets:
            if self.setdefault(target, entry) is not entry:
                raise ValueError(f"{self.kind}: {target} is already registered.")


def aten_overloads(names: str) -> list[Any]:
    """The ATen overloads named in a string such as ``"mm.default bmm.default"``.

    Raises:
        ValueError: ATen has no such operation.
    """
    return [_aten_overload(name) for name in names.split()]


def _aten_overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    if found is None or overload not in found.overloads():
        raise ValueError(f"ATen has no operation {name!r}.")
    return getattr(found, overload)
