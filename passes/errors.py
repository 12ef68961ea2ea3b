"""Errors of the passes: one fact, one remedy; the node's place is a note."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

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
            self.add_note(f"at {where(node)}")

    def __str__(self) -> str:
        return " ".join([super().__str__(), *getattr(self, "__notes__", ())])


@contextmanager
def located(node: fx.Node) -> Iterator[None]:
    """Whatever is raised inside names the place of ``node``, unless it names one already."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "__notes__", ()):
            error.add_note(f"at {where(node)}")
        raise


class NothingToSelect(GraphNotSupported):
    """There is nothing to choose from (sequences of one token): plain training is the definition."""


class NoAttention(GraphNotSupported):
    """No attention tells the token axis."""


class InvariantBroken(TokenSeekError):
    """A pass left a graph that breaks its stage's invariant: a bug in a pass or in a rule."""
