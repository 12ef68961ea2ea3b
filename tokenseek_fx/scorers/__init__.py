"""Scorers: functions ``ScoreInputs -> scores``, float [B, T]; the tokens with the highest scores are kept.

Each file has one idea and runs by itself: ``python -m tokenseek_fx.scorers.strided`` draws the selected tokens.
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

#: Other packages add scorers by an entry point of this group that names a factory.
ENTRY_POINTS = "tokenseek_fx.scorers"

#: Name for ``Config(scorer=...)`` -> factory.
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
    """Let ``Config(scorer=name)`` use ``factory()``.

    If the factory has parameters named ``alpha`` or ``beta``, they get the options.

    Raises:
        ValueError: the name has another factory.

    >>> register_scorer("nothing", lambda: lambda inputs: inputs.mask("labelled").float())
    """
    if SCORERS.setdefault(name, factory) is not factory:
        raise ValueError(f"A scorer named {name!r} is already registered. Choose another name.")


def scorer_names() -> list[str]:
    """All names for ``Config(scorer=...)``."""
    return [*SCORERS, *(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in SCORERS)]


def scorer_named(name: str, options: Mapping[str, Any]) -> Scorer:
    """The scorer with this name. Its factory gets those of ``options`` that are among its parameters."""
    known = parameters_of(name)
    return _factory(name)(**{option: value for option, value in options.items() if option in known})


def parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of the factory of the scorer with this name."""
    return inspect.signature(_factory(name)).parameters


def _factory(name: str) -> Callable[..., Scorer]:
    return SCORERS[name] if name in SCORERS else entry_points(group=ENTRY_POINTS)[name].load()
