"""Errors of the passes: a message is a fact and a remedy; the place of the node is a note."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis

from ...warnings import TokenSeekWarning
from .program import where


class TokenSeekError(Exception):
    """Base class of this package's errors."""


class ConfigError(TokenSeekError, ValueError):
    """An option is unknown or invalid, or a scorer fails."""


class GraphNotSupported(TokenSeekError):
    """A graph can't be rewritten exactly.

    The backend then compiles the plain graph and warns; with ``strict=True`` it raises this error.

    Args:
        fact: what prevents the rewrite, one sentence.
        remedy: what the user can do about it.
        node: the node in question; its module path and source line become a note.
    """

    def __init__(self, fact: str, remedy: str = "", node: fx.Node | None = None) -> None:
        super().__init__(f"{fact} {remedy}".strip())
        self.fact = fact
        if node is not None:
            _locate(self, node)

    def __str__(self) -> str:
        return " ".join([super().__str__(), *getattr(self, "__notes__", ())])


@contextmanager
def located(node: fx.Node) -> Iterator[None]:
    """Add the place of ``node`` to any error raised inside, unless the error has a place already."""
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
    """Warn about options that have no effect on a graph, given as (fact, remedy).

    Raises:
        GraphNotSupported: if ``strict``, for the first of them.
    """
    for fact, remedy in facts:
        if strict:
            raise GraphNotSupported(fact, remedy)
        warnings.warn(f"tokenseek: {fact} {remedy}", TokenSeekWarning, stacklevel=2)


@contextmanager
def in_pass(name: str) -> Iterator[None]:
    """Add the name of the pass to any error raised inside, unless the error names one already."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "tokenseek_pass"):
            error.tokenseek_pass = name  # type: ignore[attr-defined]
            node = getattr(error, "tokenseek_node", None)
            error.add_note(f"(pass {name!r})" if node is None else f"(pass {name!r}, node {node!r})")
        raise


class NothingToSelect(GraphNotSupported):
    """Sequences have a single token, so there is nothing to select; the model is trained as usual."""


class RoundsNotSupported(GraphNotSupported):
    """The gradient of a graph can't be computed in several rounds; one round is exact."""


class NoAttention(GraphNotSupported):
    """The graph has no attention, so its token axis is unknown."""


class InvariantBroken(TokenSeekError):
    """A pass returned a graph that breaks its invariant: a bug in a pass or in a rule."""


class PassFailed(GraphNotSupported):
    """A pass, or the compiler of its result, failed: a bug. The text names the pass."""


@contextmanager
def bugs_reported() -> Iterator[None]:
    """Raise ``PassFailed`` in place of an error that no pass raises on purpose."""
    try:
        yield
    except InvariantBroken as error:
        raise _failed(error) from error
    except (TokenSeekError, TensorifyScalarRestartAnalysis):  # by the latter, Dynamo traces once more
        raise
    except Exception as error:
        raise _failed(error) from error


def _failed(error: Exception) -> PassFailed:
    first_line = (str(error).strip().splitlines() or [""])[0]
    fact = " ".join((f"internal error, {type(error).__name__}: {first_line}", *getattr(error, "__notes__", ())))
    return PassFailed(f"{fact}.", "This is a bug in tokenseek-fx: please report it, with this message and the model.")
