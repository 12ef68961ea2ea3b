"""Ditch: the graph executed twice, once for all tokens without gradient, once for the selected rows with gradient.

1. **Seek stream**: every input detached. It gives the forward values, each attention's keys and values, and the scores.
2. **Select**: scores -> sorted row indices ``[B, k]``.
3. **Ditch stream**: every live operation re-executed on the selected rows (``rules/rows.py``). Where tokens mix, it uses the
   full values of the seek stream with its own rows put in their place. An operation that can't be restricted is a
   *barrier*: run in full on such values, its rows gathered again. Always exact, saves less; reported.

The pass is an interpreter with a table of rules, traced back to a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from .canonicalize import is_autocast
from .errors import GraphNotSupported, InvariantBroken
from .fake import fake_mode_of
from .frozen import made_of_rows
from .geometry import Geometry, device_of, example_sizes, sizes_of
from .program import Program
from .remake import Remade, find_remade
from .seek import Seek, Signals
from .select import ScoreInputs, Select, Selected
from .streams import Barrier, Streams, class_factors, refuse_unweighted, weighted_losses
from .tags import tagged
from .tail import Traced
from .token_axes import TokenAxis


@dataclass(frozen=True)
class Rewrite:
    """The rewritten forward ``module(*inputs) -> (*outputs, *what was selected)``, the latter by ``names``, one tuple of them
    for each token axis. ``inputs`` are those of the program, then the rows that were given, or noise for the axes ``noisy`` (numbers).
    ``seek``: where the values of the seek stream stand in it, by their nodes in the program."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    barriers: tuple[Barrier, ...]
    names: tuple[tuple[str, ...], ...]
    noisy: tuple[int, ...] = ()
    seek: dict[fx.Node, fx.Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Ditch:
    """Trace the two streams. Reads ``axes``, ``activity`` and ``blocks``; writes ``rewrite``.

    ``select``: how tokens are scored and chosen; ``others``: those of further token axes, in order. ``signals``: what scores are
    made of. ``logits``: "keep" returns them in full, "drop" with length 0. ``report_loss``: "full" returns the loss of all tokens
    (with the gradient of the kept ones), "kept" that of the kept ones, ``None`` the full one where the scores need it anyway.
    ``kv_grad``: "selected" cuts keys and values of the other tokens, "all" keeps their own projections live. ``remake``: they are made again
    where that keeps fewer bytes (``remake.py``). ``given``: examples
    of the rows [B, k] (and their weights) that are inputs of the rewritten graph; ``select`` then chooses nothing. ``part``: the
    graph is a part of a model, all that it returns stays live in the kept rows.
    """

    select: Select
    others: tuple[Select, ...] = ()
    signals: Signals = field(default_factory=Signals)
    logits: str = "keep"
    report_loss: str | None = None
    kv_grad: str = "selected"
    remake: bool = False
    given: tuple[Tensor, ...] = ()
    part: bool = False
    name: str = "ditch"

    def run(self, program: Program) -> Program:
        assert program.axes is not None and program.activity is not None and program.blocks is not None
        if self.select.method == "sample" and not self.given:
            refuse_unweighted(program)
        barriers: list[Barrier] = []
        names: list[tuple[str, ...]] = []
        places: dict[fx.Node, fx.Node] = {}
        tail = None if self.given else self._tail(program)
        remade = find_remade(program) if self.remake else Remade()
        again = made_of_rows(program)

        def forward(*args: Any) -> tuple:
            written, extra = args[: len(program.inputs)], args[len(program.inputs) :]
            inputs = tuple(x.clone() if i in program.mutated else x for i, x in enumerate(written))
            seek = Seek(program, inputs, remade.sources)
            choose = self._take if self.given else self._choose
            geometries, selections = choose(seek, tail, *extra)
            known = remade.nodes, seek.cast, again
            streams = Streams(program, seek.values, geometries, inputs, barriers, self.kv_grad, *known)
            streams.run()
            places.update(seek.nodes())
            outputs = tuple(self._outputs(program, streams))
            for index, update in zip(program.mutated, program.updates, strict=True):
                written[index].copy_(seek.values[update])
            names[:] = map(tuple, selections)
            return (*outputs, *_flat(selections))

        inputs = (*program.inputs, *(self.given or self._noise(program)))
        module = _traced(forward, inputs, program)
        rewrite = Rewrite(module, inputs, tuple(barriers), tuple(names), self._noisy(program), places)
        return replace(program, rewrite=rewrite)

    def choice(self, program: Program) -> Program:
        """The choice alone as the rewrite: ``module(*inputs) -> what is selected``; it writes to no input."""
        names: list[tuple[str, ...]] = []
        tail = self._tail(program)

        def choose(*args: Any) -> tuple:
            seek = Seek(program, args[: len(program.inputs)])
            _, selections = self._choose(seek, tail, *args[len(program.inputs) :])
            names[:] = map(tuple, selections)
            return _flat(selections)

        inputs = (*program.inputs, *self._noise(program))
        module = _traced(choose, inputs, program)
        return replace(program, rewrite=Rewrite(module, inputs, (), tuple(names), self._noisy(program)))

    def check(self, program: Program) -> None:
        """The graph is well-formed and has every output of the model and of the selections."""
        assert program.rewrite is not None
        graph = program.rewrite.module.graph
        graph.lint()
        if len(graph.output_node().args[0]) != len(program.outputs) + sum(map(len, program.rewrite.names)):
            raise InvariantBroken("The rewritten graph lost an output.")

    def _selects(self, program: Program) -> dict[TokenAxis, Select]:
        """How the tokens of every axis are chosen; the last way given also for those that none is given for."""
        ways = (self.select, *self.others)
        return {axis: ways[min(i, len(ways) - 1)] for i, axis in enumerate(program.axes.tokens)}

    def _noisy(self, program: Program) -> tuple[int, ...]:
        """The numbers of the token axes whose choice needs noise."""
        ways = self._selects(program).values()
        return () if self.given else tuple(i for i, way in enumerate(ways) if "noise" in way.needs)

    def _choose(
        self, seek: Seek, tail: Traced | None, *noise: Tensor
    ) -> tuple[list[Geometry], list[dict[str, Tensor]]]:
        """The rows by their scores, and what is told of them, for every token axis."""
        program, selects = seek.program, self._selects(seek.program)
        noisy = [program.axes.tokens[i] for i in self._noisy(program)]
        needs = {axis: select.needs for axis, select in selects.items()}
        known = seek.look(self.signals, needs, tail, dict(zip(noisy, noise, strict=True)))
        geometries, selections = [], []
        for axis, select in selects.items():
            with tagged("select"):
                chosen = select(known[axis])
                if axis != program.axes.main or not weighted_losses(program):
                    chosen = chosen._replace(weights=None)
            sizes = known[axis].batch, known[axis].tokens
            geometries.append(Geometry(program.axes, axis, chosen.indices, *sizes, chosen.weights))
            selections.append(_selection(known[axis], chosen))
        return geometries, selections

    def _take(self, seek: Seek, tail: None, *given: Tensor) -> tuple[list[Geometry], list[dict[str, Tensor]]]:
        """The rows that were given, of which there is nothing to tell."""
        program = seek.program
        if len(program.axes.tokens) > 1:
            raise GraphNotSupported(
                f"Rows were given for one token axis, but the graph has {len(program.axes.tokens)}.",
                "Let the backend choose the rows of an encoder-decoder.",
            )
        indices, *weights = given if weighted_losses(program) else given[:1]
        sizes = sizes_of(program, program.axes.main, seek.values)
        return [Geometry(program.axes, program.axes.main, indices, *sizes, *weights)], []

    def _tail(self, program: Program) -> Traced | None:
        needs = frozenset().union(*(select.needs for select in self._selects(program).values()))
        return self.signals.tail(program, needs, self._builds_no_logits(program))

    @property
    def _reports_full(self) -> bool:
        ways = (self.select, *self.others)
        scored = any(way.needs & {"gradient", "loss"} for way in ways) and not self.given
        return (self.report_loss or ("full" if scored else "kept")) == "full"

    def _builds_no_logits(self, program: Program) -> bool:
        """True where the full loss has to come from the chunks of the tail."""
        return self._reports_full and self.logits == "drop" and bool(program.activity.losses)

    def _noise(self, program: Program) -> list[Tensor]:
        with fake_mode_of(program.inputs):
            shapes = [example_sizes(program, program.axes.tokens[i]) for i in self._noisy(program)]
            return [torch.empty(shape, device=device_of(program)) for shape in shapes]

    def _outputs(self, program: Program, streams: Streams) -> Iterator[Any]:
        """Losses live, the rest as the full forward has it; without a loss, values in full that live in the kept rows."""
        assert program.activity is not None
        classes = class_factors(program)
        for out in program.outputs:
            if not isinstance(out, fx.Node):
                yield out
            elif out not in program.activity.live:
                yield streams.seek[out]
            elif out in program.activity.losses:
                yield self._loss(streams, out)
            elif self.part or not program.activity.losses:
                yield streams.full(out)
            elif self.logits == "drop" and program.axes.has_rows(out) and classes & set(sum(program.axes.of(out), ())):
                yield _without_tokens(streams, out)
            else:
                yield streams.seek[out].detach()

    def _loss(self, streams: Streams, out: fx.Node) -> Tensor:
        """The loss of the kept tokens, or the value of the full one with the gradient of the kept tokens."""
        kept = streams.full(out)
        if not self._reports_full:
            return kept
        return streams.seek[out].detach() + (kept - kept.detach())


def _flat(selections: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(x for selection in selections for x in selection.values())


def _selection(known: ScoreInputs, chosen: Selected) -> dict[str, Tensor]:
    """What is told of a selection, by the names of ``recording.Selection``."""
    signals = {name: getattr(known, name) for name in ("attention", "gradient", "loss", "labelled")}
    return {name: x for name, x in {**chosen._asdict(), **signals}.items() if x is not None}


def _without_tokens(streams: Streams, node: fx.Node) -> torch.Tensor:
    """An empty tensor in place of ``node``, made without computing it."""
    value, geometry, axes = streams.seek[node], streams.geometry_of(node), streams.axes
    sizes = {geometry.axis.token: 0, geometry.axis.batch: geometry.batch}
    shape = [sizes.get(label, size) if label else size for label, size in zip(axes.of(node), value.shape, strict=True)]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _traced(function: Callable[..., tuple], inputs: tuple[Any, ...], program: Program) -> fx.GraphModule:
    with warnings.catch_warnings(), fx_traceback.preserve_node_meta(), fake_mode_of(inputs):
        warnings.filterwarnings("ignore", message=".*pre-dispatch.*")
        module = make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs)
    _name_placeholders(module, program)
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_autocast(node))
    module.recompile()
    return module


def _name_placeholders(module: fx.GraphModule, program: Program) -> None:
    """Inputs keep the names that they had."""
    for new, old in zip(module.graph.find_nodes(op="placeholder"), program.placeholders, strict=False):
        new.target = new.name = old.name
