"""Scorers: functions ``ScoreInputs -> scores [B, T]``; the tokens with the highest scores are kept.

One idea per file, each runnable by itself: ``python -m tokenseek_fx.scorers.strided`` draws what it picks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from ..passes.streams.select import Scorer
from .attention import attention
from .ends import first, last
from .gradient import gradient
from .loss import loss
from .random import random
from .strided import strided
from .tokenseek import tokenseek

#: Distributions add scorers by naming a factory in this group of entry points.
ENTRY_POINTS = "tokenseek_fx.scorers"

#: Factories by the name that ``Config(scorer=...)`` takes.
SCORERS: dict[str, Callable[..., Scorer]] = {
    "tokenseek": tokenseek,
    "attention": attention,
    "gradient": gradient,
    "loss": loss,
    "random": random,
    "strided": strided,
    "first": first,
    "last": last,
}


def register_scorer(name: str, factory: Callable[..., Scorer]) -> None:
    """Let ``Config(scorer=name)`` mean ``factory()``. A factory with parameters named ``alpha``, ``beta`` gets the options.

    Raises ``ValueError`` where another factory has the name.

    >>> register_scorer("nothing", lambda: lambda inputs: inputs.mask("labelled").float())
    """
    if SCORERS.setdefault(name, factory) is not factory:
        raise ValueError(f"A scorer called {name!r} is registered already.")


def scorer_names() -> list[str]:
    """All names that ``Config(scorer=...)`` takes."""
    return [*SCORERS, *(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in SCORERS)]


def scorer_named(name: str, options: Mapping[str, Any]) -> Scorer:
    """The scorer of a name, given those of ``options`` that its factory has parameters for."""
    known = parameters_of(name)
    return _factory(name)(**{option: value for option, value in options.items() if option in known})


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a scorer's factory."""
    return inspect.signature(_factory(name)).parameters


def _factory(name: str) -> Callable[..., Scorer]:
    return SCORERS[name] if name in SCORERS else entry_points(group=ENTRY_POINTS)[name].load()
