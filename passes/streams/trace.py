"""Trace: turn the function of the two streams into a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from ..capture.retrace import is_autocast
from ..graph.copies import copied
from ..graph.errors import InvariantBroken
from ..graph.fake import fake_mode_of
from ..graph.program import Program
from .barriers import Barrier
from .rounds import Rounds
from .two_streams import Run, TwoStreams


@dataclass(frozen=True)
class Rewrite:
    """The rewritten forward as a graph: ``module(*inputs) -> (*outputs, *selected)``.

    Args:
        module: the graph.
        inputs: example inputs, as in ``TwoStreams``.
        barriers: the barriers of the ditch stream.
        names: the names of the ``selected`` outputs, one tuple for each token axis.
        noisy: as in ``TwoStreams``.
        seek: for nodes of the program, the node of the seek stream's value in this graph.
        rounds: for every phase of the rounds, how many of the last outputs of the graph are its own, and the number of
            its first block.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    barriers: tuple[Barrier, ...]
    names: tuple[tuple[str, ...], ...]
    noisy: tuple[int, ...] = ()
    seek: dict[fx.Node, fx.Node] = field(default_factory=dict)
    rounds: tuple[tuple[int, int], ...] = ()

    def copied(self) -> Rewrite:
        """A copy with its own graph, for a pass that changes it."""
        module, nodes = copied(self.module)
        seek = {node: nodes.get(place, place) for node, place in self.seek.items()}  # some were removed as dead code
        return replace(self, module=module, seek=seek)


@dataclass(frozen=True)
class TraceStreams:
    """Trace the rewritten forward.

    Reads ``TwoStreams``; writes ``Rewrite``. ``choice_only``: trace only the selection of rows.
    """

    choice_only: bool = False
    name: str = "trace"

    def run(self, program: Program) -> Program:
        streams, runs = program[TwoStreams], list[Run]()
        places: dict[fx.Node, fx.Node] = {}

        def forward(*args: Any) -> tuple[Any, ...]:
            runs.append((streams.choose if self.choice_only else streams.run)(*args))
            seek = runs[-1].seek
            places.update(seek.nodes if seek is not None else {})
            return runs[-1].flat

        module = _traced(forward, streams.inputs, program)
        while any(missing := [one.missing for one in runs[-1].rounds]):
            streams = streams.reading(missing)
            module = _traced(forward, streams.inputs, program)
        program, run = program.with_(streams.program[Rounds], streams), runs[-1]
        names = tuple(tuple(told) for told in run.selected)
        rounds = tuple((len(one.flat), one.block) for one in run.rounds)
        return program.with_(Rewrite(module, streams.inputs, run.barriers, names, streams.noisy, places, rounds))

    def check(self, program: Program) -> None:
        """The graph is well-formed and has every output of the model and of the selections."""
        rewrite = program[Rewrite]
        rewrite.module.graph.lint()
        outputs = 0 if self.choice_only else len(program.outputs)
        outputs += sum(map(len, rewrite.names)) + sum(count for count, _ in rewrite.rounds)
        if len(rewrite.module.graph.output_node().args[0]) != outputs:
            raise InvariantBroken("The rewritten graph lost an output.")


def _traced(function: Callable[..., tuple], inputs: tuple[Any, ...], program: Program) -> fx.GraphModule:
    with warnings.catch_warnings(), fx_traceback.preserve_node_meta(), fake_mode_of(inputs):
        warnings.filterwarnings("ignore", message=".*pre-dispatch.*")
        module = make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs)
    _name_placeholders(module, program)
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_autocast(node))
    module.recompile()
    return module


def _name_placeholders(module: fx.GraphModule, program: Program) -> None:
    """Give inputs the names that they have in the program."""
    for new, old in zip(module.graph.find_nodes(op="placeholder"), program.placeholders, strict=False):
        new.target = new.name = old.name
