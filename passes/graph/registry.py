"""Registry: a table of rules by operation, in which every entry is made once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import torch

Entry = TypeVar("Entry")


class Registry(dict[Any, Entry], Generic[Entry]):
    """Entries by operation (``OpOverload``, ``"library::operation"`` for a library that may not be imported) or by name.

    ``kind`` says in errors what the entries are.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, targets: Iterable[Any], entry: Entry) -> None:
        """Add an entry for every target.

        Raises:
            ValueError: a target has an entry already, or none is given.
        """
        targets = tuple(targets)
        if not targets:
            raise ValueError(f"{self.kind}: name at least one target.")
        for target in targets:
            if self.setdefault(target, entry) is not entry:
                raise ValueError(f"{self.kind}: {target} is registered already.")


def aten_overloads(names: str) -> list[Any]:
    """The overloads of ATen that a text names, ``"mm.default bmm.default"``.

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
