"""Tags: what nodes carry from where they are traced: a kind, for reports, and the block of the ditch stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.fx import traceback as fx_traceback

#: Where ``meta["custom"]`` says in which block of the ditch stream a node was traced, beside its kind.
BLOCK = "tokenseek_block"
#: The kind of what makes keys and values again (``remake.py``).
REMADE = "remade"


@contextmanager
def tagged(kind: str, node: fx.Node | None = None) -> Iterator[None]:
    """Nodes traced inside carry the place of ``node`` and ``meta["custom"]["tokenseek"] = kind``."""
    before = fx_traceback.current_meta
    place = node.meta if node is not None else before
    with _traced_at(place, {"tokenseek": kind, BLOCK: block_of(before)}):
        yield


@contextmanager
def in_block(number: int) -> Iterator[None]:
    """Nodes traced inside belong to this block of the ditch stream (0: to none)."""
    with _traced_at(fx_traceback.current_meta, {BLOCK: number}):
        yield


@contextmanager
def _traced_at(place: dict[str, Any], custom: dict[str, Any]) -> Iterator[None]:
    before = fx_traceback.current_meta
    fx_traceback.current_meta = {**place, "custom": {**place.get("custom", {}), **custom}}
    try:
        yield
    finally:
        fx_traceback.current_meta = before


def block_of(meta: Mapping[str, Any]) -> int:
    """The block that ``in_block`` wrote into a node's ``meta``; 0: none."""
    return meta.get("custom", {}).get(BLOCK, 0)
