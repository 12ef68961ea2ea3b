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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from .canonicalize import is_autocast
from .errors import InvariantBroken
from .fake import fake_mode_of
from .geometry import Geometry, device_of, example_sizes
from .program import Program
from .seek import Seek, Signals
from .select import ScoreInputs, Select, Selected
from .streams import Barrier, Streams, class_factors, refuse_unweighted, tagged, weighted_losses
from .token_axes import TokenAxis


@dataclass(frozen=True)
class Rewrite:
    """The rewritten forward ``module(*inputs) -> (*outputs, *what was selected)``, the latter by ``names``, one tuple of them
    for each token axis. ``inputs`` are those of the program, then noise for the axes ``noisy`` (numbers)."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    barriers: tuple[Barrier, ...]
    names: tuple[tuple[str, ...], ...]
    noisy: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ditch:
    """Trace the two streams. Reads ``axes``, ``activity`` and ``blocks``; writes ``rewrite``.

    ``select``: how tokens are scored and chosen; ``others``: those of further token axes, in order. ``signals``: what scores are made of. ``logits``: "keep" returns them in
    full, "drop" with length 0. ``report_loss``: "full" returns the loss of all tokens (with the gradient of the kept ones),
    "kept" that of the kept ones, ``None`` the full one where the scores need it anyway. ``kv_grad``: "selected" cuts keys
    and values of the other tokens, "all" keeps their own projections live.
    """

    select: Select
    others: tuple[Select, ...] = ()
    signals: Signals = field(default_factory=Signals)
    logits: str = "keep"
    report_loss: str | None = None
    kv_grad: str = "selected"
    name: str = "ditch"

    def run(self, program: Program) -> Program:
        assert program.axes is not None and program.activity is not None and program.blocks is not None
        if self.select.method == "sample":
            refuse_unweighted(program)
        selects = self._selects(program)
        noisy = tuple(i for i, select in enumerate(selects.values()) if "noise" in select.needs)
        barriers: list[Barrier] = []
        names: list[tuple[str, ...]] = []
        everything = frozenset().union(*(select.needs for select in selects.values()))
        tail = self.signals.tail(program, everything, self._builds_no_logits(program))

        def forward(*args: Any) -> tuple:
            written, noise = args[: len(program.inputs)], args[len(program.inputs) :]
            inputs = tuple(x.clone() if i in program.mutated else x for i, x in enumerate(written))
            noise = {program.axes.tokens[i]: x for i, x in zip(noisy, noise, strict=True)}
            seek = Seek(program, inputs)
            needs = {axis: select.needs for axis, select in selects.items()}
            known = seek.look(self.signals, needs, tail, noise)
            with tagged("select"):
                chosen = {axis: self._choose(program, axis, select, known[axis]) for axis, select in selects.items()}
            geometries = [
                Geometry(program.axes, axis, rows.indices, known[axis].batch, known[axis].tokens, rows.weights)
                for axis, rows in chosen.items()
            ]
            streams = Streams(program, seek.values, geometries, inputs, barriers, self.kv_grad)
            streams.run()
            outputs = tuple(self._outputs(program, streams))
            for index, update in zip(program.mutated, program.updates, strict=True):
                written[index].copy_(seek.values[update])
            selections = [_selection(known[axis], chosen[axis]) for axis in selects]
            names[:] = [tuple(selection) for selection in selections]
            return (*outputs, *(x for selection in selections for x in selection.values()))

        inputs = (*program.inputs, *self._noise(program, noisy))
        with warnings.catch_warnings(), fx_traceback.preserve_node_meta(), fake_mode_of(inputs):
            warnings.filterwarnings("ignore", message=".*pre-dispatch.*")
            module = make_fx(forward, pre_dispatch=True, tracing_mode="real")(*inputs)
        _name_placeholders(module, program)
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_autocast(node))
        module.recompile()
        return replace(program, rewrite=Rewrite(module, inputs, tuple(barriers), tuple(names), noisy))

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

    def _choose(self, program: Program, axis: TokenAxis, select: Select, known: ScoreInputs) -> Selected:
        """Weights are for losses over tokens of the axis alone."""
        chosen = select(known)
        weighted = axis == program.axes.main and weighted_losses(program)
        return chosen if weighted else chosen._replace(weights=None)

    @property
    def _reports_full(self) -> bool:
        ways = (self.select, *self.others)
        scored = any(way.needs & {"gradient", "loss"} for way in ways)
        return (self.report_loss or ("full" if scored else "kept")) == "full"

    def _builds_no_logits(self, program: Program) -> bool:
        """True where the full loss has to come from the chunks of the tail."""
        return self._reports_full and self.logits == "drop" and bool(program.activity.losses)

    def _noise(self, program: Program, noisy: Iterable[int]) -> list[Tensor]:
        with fake_mode_of(program.inputs):
            shapes = [example_sizes(program, program.axes.tokens[i]) for i in noisy]
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
            elif not program.activity.losses:
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


def _name_placeholders(module: fx.GraphModule, program: Program) -> None:
    """Inputs keep the names that they had."""
    for new, old in zip(module.graph.find_nodes(op="placeholder"), program.placeholders, strict=False):
        new.target = new.name = old.name
