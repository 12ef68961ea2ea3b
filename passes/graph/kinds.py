"""Kinds and marks: labels that nodes carry in ``meta["custom"]``, which survives AOTAutograd.

A *kind* is for reports: what a value is counted as. A *mark* decides what later passes do with a node. The *block* is
the block of the ditch stream that a node belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from torch import fx
from torch.fx import traceback as fx_traceback

_KIND, _MARK = "tokenseek", "tokenseek_mark"
#: The key of the block in ``meta["custom"]``.
BLOCK = "tokenseek_block"


class Kind(StrEnum):
    """What a value is counted as in reports."""

    SEEK = "seek"  #: computed for all tokens in the seek stream
    ROWS = "rows"  #: of the kept rows
    KEYS_VALUES = "keys/values"
    BLOCK_INPUTS = "block inputs"  #: of all tokens; keys and values are recomputed from them
    RECOMPUTED = "recomputed"  #: keys and values that are recomputed from block inputs
    LOGITS = "logits"
    SCORES = "scores"  #: with two token axes
    BARRIER = "barrier"  #: kept rows scattered into all tokens for an operation that mixes tokens
    SCORING = "scoring"
    SELECT = "select"
    ACTIVATIONS = "activations"
    HOST = "host"  #: in host memory


class Mark(StrEnum):
    """What later passes do with a node."""

    KEYS_VALUES = "keys/values"  #: stored for backward as the keys/values mode says
    RECOMPUTED = "recomputed"  #: recomputes keys and values, and is itself recomputed in backward
    ON_HOST = "on host"  #: takes no device memory


@contextmanager
def tagged(kind: Kind, node: fx.Node | None = None, mark: Mark | None = None) -> Iterator[None]:
    """Give nodes traced inside ``kind`` and ``mark``, and the place (module, source line) of ``node``."""
    before = fx_traceback.current_meta
    place = node.meta if node is not None else before
    with _traced_at(place, {_KIND: kind, _MARK: mark, BLOCK: block_of(before)}):
        yield


@contextmanager
def in_block(number: int) -> Iterator[None]:
    """Assign nodes traced inside to this block of the ditch stream (0: no block)."""
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


def tag(node: fx.Node, kind: Kind, mark: Mark | None = None) -> None:
    """Set the kind and the mark of a node."""
    node.meta["custom"] = {**node.meta.get("custom", {}), _KIND: kind, _MARK: mark}


def kind_of(node: fx.Node) -> Kind | None:
    """The kind that a node was traced with; ``None`` if it has none."""
    return node.meta.get("custom", {}).get(_KIND)


def mark_of(node: fx.Node) -> Mark | None:
    """The mark that a node was traced with; ``None`` if it has none."""
    return node.meta.get("custom", {}).get(_MARK)


def block_of(meta: Mapping[str, Any]) -> int:
    """The block that ``in_block`` wrote into a node's ``meta``; 0 if there is no block."""
    return meta.get("custom", {}).get(BLOCK, 0)


def without_block(meta: Mapping[str, Any]) -> dict[str, Any]:
    """``meta`` without its block, so that equal blocks have equal graphs."""
    custom = {name: value for name, value in meta.get("custom", {}).items() if name != BLOCK}
    return {**meta, "custom": custom}
