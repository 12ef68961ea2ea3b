"""The pipeline: passes in order, on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from .activity import FindActivity
from .attend import FindAttending
from .blocks import FindBlocks
from .canonicalize import Canonicalize
from .ditch import Ditch
from .program import Program
from .shift import UnshiftLabels
from .split import Split
from .token_axes import FindTokenAxes


class Pass(Protocol):
    """A named frozen value: ``run`` returns a program with one more result, ``check`` verifies what it promises."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> Program: ...

    def check(self, program: Program) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Prints itself, can stop after any pass, and checks each stage's invariant.

    >>> print(analysis())
    1. canonicalize: Dynamo's graph -> a functional pre-dispatch ATen graph that has lost nothing.
    2. unshift labels: a loss over a slice of the tokens -> the same loss over all tokens.
    3. activity: which values carry gradient.
    4. token axes: for every value of the graph, which factors of which dims are the token axis and the batch.
    5. blocks: the residual stream, the attentions, the entry of the last block, the losses.
    6. attending: which attentions can look at keys and values as they are, by position.
    """

    passes: tuple[Pass, ...]

    def run(
        self, program: Program, until: str | None = None, after: Callable[[Pass, Program], None] | None = None
    ) -> Program:
        """Run all passes, or up to and with the one named ``until``; ``after`` sees the program after each."""
        for step in self._up_to(until):
            program = step.run(program)
            step.check(program)
            if after is not None:
                after(step, program)
        return program

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
    """``name: first line of the module's docstring after its title``."""
    import sys

    doc = (sys.modules[type(step).__module__].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    return f"{step.name}: {doc.split(': ', 1)[-1]}"


def analysis() -> Pipeline:
    """What is known about a graph before it is rewritten."""
    return Pipeline(
        (
            Canonicalize(),
            UnshiftLabels(),  # before the axes: it removes an axis that is a slice of the token axis
            FindActivity(),
            FindTokenAxes(),
            FindBlocks(),
            FindAttending(),
        )
    )


def rewriting(ditch: Ditch) -> Pipeline:
    """The analysis, the rewrite, and the cut into segments."""
    return analysis() + ditch + Split()
