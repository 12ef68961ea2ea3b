"""The pipeline: every pass in order, on one page.

``training(plan)`` is what the backend runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from .analysis.activity import FindActivity
from .analysis.blocks import FindBlocks
from .analysis.moved_rows import FindMovedRows
from .analysis.routing import FindRoutes
from .analysis.token_axes import FindTokenAxes
from .attention.positional import FindPositionalAttention
from .capture.canonicalize import Canonicalize
from .capture.unshift_labels import UnshiftLabels
from .graph.errors import in_pass
from .graph.program import Program
from .keep.frozen_rows import FindFrozenRows
from .keep.recompute_kv import PlanKV
from .lower.chunks import Chunk
from .lower.split import CopyKV, Split
from .lower.unalias import UnaliasOutputs
from .memory.recompute import PlanRecompute
from .plan import Plan
from .streams.rounds import PlanRounds
from .streams.selection_plan import PlanSelection
from .streams.trace import TraceStreams
from .streams.two_streams import BuildStreams, PlanScoring

#: The last pass that only analyses the graph.
ANALYSED = "positional attention"


def training(plan: Plan) -> Pipeline:
    """The passes that rewrite a graph for training."""
    signals, given = plan.signals, bool(plan.given)
    return Pipeline(
        (
            # analyse the graph
            Canonicalize(),
            UnshiftLabels(),  # before the token axes: it removes an axis that is a slice of the token axis
            FindActivity(),
            FindTokenAxes(plan.passed),
            FindRoutes(),
            FindMovedRows(given),
            FindBlocks(),
            FindPositionalAttention(),
            # plan the rewrite
            FindFrozenRows(),
            PlanKV(plan.kv, plan.is_inductor, plan.strict),
            PlanSelection(plan.selects, signals, plan.logits, plan.report_loss, plan.substitutes, given, plan.strict),
            PlanRounds(plan.rounds, plan.kv_grad, plan.given, plan.is_fragment),
            PlanScoring(signals, plan.logits, plan.report_loss, given),
            # rewrite the graph
            BuildStreams(signals, plan.logits, plan.kv_grad, plan.given, plan.is_fragment),
            TraceStreams(),
            # lower the rewritten graph
            Chunk(plan.chunk_bytes),
            UnaliasOutputs(),
            CopyKV(),  # before the split: copies belong to the first segment
            Split(),
            PlanRecompute(plan.recompute, plan.kv),
        )
    )


class Pass(Protocol):
    """A named frozen object. ``run`` returns the program with one more result, and ``check`` verifies that result."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> Program: ...

    def check(self, program: Program) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Running a pipeline checks the invariant of every pass, skips passes that have run already, and may stop after any
    pass. An error names its pass. ``str`` lists the passes.
    """

    passes: tuple[Pass, ...]

    def run(
        self, program: Program, until: str | None = None, after: Callable[[Pass, Program], None] | None = None
    ) -> Program:
        """Run the passes that have not run on ``program`` yet.

        Args:
            program: the program; it is not changed.
            until: the name of the last pass to run; ``None``: all.
            after: called with each pass and the program that it returned.

        Raises:
            ValueError: no pass has the name ``until``.
        """
        for step in self._up_to(until):
            if step.name in program.done:
                continue
            with in_pass(step.name):
                program = step.run(program)
                step.check(program)
            program = replace(program, done=(*program.done, step.name))
            if after is not None:
                after(step, program)
        return program

    def until(self, name: str) -> Pipeline:
        """The pipeline up to and including the pass with this name.

        Raises:
            ValueError: no pass has this name.
        """
        return Pipeline(tuple(self._up_to(name)))

    def _up_to(self, until: str | None) -> Iterator[Pass]:
        names = [step.name for step in self.passes]
        if until is not None and until not in names:
            raise ValueError(f"No pass is called {until!r}; the passes are: {', '.join(names)}.")
        yield from self.passes[: names.index(until) + 1] if until else self.passes

    def __add__(self, step: Pass) -> Pipeline:
        return Pipeline((*self.passes, step))

    def __str__(self) -> str:
        return "\n".join(f"{i}. {_describe(step)}" for i, step in enumerate(self.passes, 1))


def _describe(step: Pass) -> str:
    """``name: first line of the class's docstring``."""
    doc = (type(step).__doc__ or sys.modules[type(step).__module__].__doc__ or "").strip()
    first_line = doc.split("\n")[0]
    return f"{step.name}: {first_line}"
