"""Programs for tests: a graph that is analysed, rewritten, or executed as two streams without tracing."""

from __future__ import annotations

from typing import Any

from tokenseek_fx.passes import Plan, Program, Select, training
from tokenseek_fx.passes.pipeline import ANALYSED
from tokenseek_fx.passes.streams.select import Scorer
from tokenseek_fx.scorers import strided


def planned(scorer: Scorer | None = None, keep_ratio: float = 0.1, **options: Any) -> Plan:
    return Plan((Select(scorer or strided(), keep_ratio),), **options)


def analysed(program: Program) -> Program:
    return training(planned()).run(program, until=ANALYSED)


def rewritten(
    program: Program, scorer: Scorer | None = None, keep_ratio: float = 0.1, until: str = "trace", **options: Any
) -> Program:
    return training(planned(scorer, keep_ratio, **options)).run(program, until=until)
