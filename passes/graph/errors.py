"""Errors of the passes: one fact, one remedy; the node's place is a note."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import fx

from ...warnings import TokenSeekWarning
from .program import where


class TokenSeekError(Exception):
    """Base class of this package's errors."""


class ConfigError(TokenSeekError, ValueError):
    """An unknown or bad option, or a scorer that fails."""


class GraphNotSupported(TokenSeekError):
    """A graph that can't be rewritten exactly. The backend falls back to the plain graph with a warning, or raises it
    when ``strict=True``."""

    def __init__(self, fact: str, remedy: str = "", node: fx.Node | None = None) -> None:
        super().__init__(f"{fact} {remedy}".strip())
        if node is not None:
            _locate(self, node)

    def __str__(self) -> str:
        return " ".join([super().__str__(), *getattr(self, "__notes__", ())])


@contextmanager
def located(node: fx.Node) -> Iterator[None]:
    """Whatever is raised inside names the place of ``node``, unless it names one already."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "__notes__", ()):
            _locate(error, node)
        raise


def _locate(error: Exception, node: fx.Node) -> None:
    """Note the module path and the user's line of a node, and remember its name."""
    error.add_note(f"at {where(node)}")
    error.tokenseek_node = node.name  # type: ignore[attr-defined]


def tell_no_effect(facts: Iterable[tuple[str, str]], strict: bool) -> None:
    """Warn of options that a graph has no use for, given as (fact, remedy); raise ``GraphNotSupported`` where ``strict``."""
    for fact, remedy in facts:
        if strict:
            raise GraphNotSupported(fact, remedy)
        warnings.warn(f"tokenseek: {fact} {remedy}", TokenSeekWarning, stacklevel=2)


@contextmanager
def in_pass(name: str) -> Iterator[None]:
    """Whatever is raised inside names the pass, unless it names one already."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "tokenseek_pass"):
            error.tokenseek_pass = name  # type: ignore[attr-defined]
            node = getattr(error, "tokenseek_node", None)
            error.add_note(f"(pass {name!r})" if node is None else f"(pass {name!r}, node {node!r})")
        raise


class NothingToSelect(GraphNotSupported):
    """There is nothing to choose from (sequences of one token): plain training is the definition."""


class NoAttention(GraphNotSupported):
    """No attention tells the token axis."""


class InvariantBroken(TokenSeekError):
    """A pass left a graph that breaks its stage's invariant: a bug in a pass or in a rule."""
