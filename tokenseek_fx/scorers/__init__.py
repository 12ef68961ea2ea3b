"""Scorers: functions ``ScoreInputs -> scores [B, T]``; the tokens with the highest scores are kept.

One idea per file, each runnable by itself: ``python -m tokenseek_fx.scorers.strided`` draws what it picks.
"""

from __future__ import annotations

from collections.abc import Callable

from ..passes.select import Scorer
from .ends import first, last
from .random import random
from .strided import strided

#: Factories by the name that ``Config(scorer=...)`` takes.
SCORERS: dict[str, Callable[[], Scorer]] = {"random": random, "strided": strided, "first": first, "last": last}


def scorer_named(name: str) -> Scorer:
    return SCORERS[name]()


def needs_noise(scorer: Scorer) -> bool:
    """True when the scorer asks for ``ScoreInputs.noise``."""
    return bool(getattr(scorer, "needs_noise", False))
