"""Two streams: the forward as a function that executes the graph twice, for all tokens without gradient and for the kept rows with it.

1. **Seek stream**: every input detached. It gives the forward values, each attention's keys and values, and the signals.
2. **Select**: scores -> sorted row indices ``[B, k]``.
3. **Ditch stream**: every live operation re-executed on the kept rows (``rows/``). Where tokens mix, it uses the full values of the
   seek stream with its own rows put in their place. An operation that can't be restricted is a *barrier*: run in full on such
   values, its rows gathered again. Always exact, saves less; reported.

The function runs on real tensors as it is; ``trace.py`` makes a graph of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.activity import Activity
from ..analysis.losses import class_factors, weighted_losses
from ..analysis.row_index import RowIndex, device_of, example_sizes, sizes_of
from ..analysis.token_axes import TokenAxes
from ..graph.errors import GraphNotSupported
from ..graph.fake import fake_mode_of
from ..graph.kinds import Kind, tagged
from ..graph.program import Program
from ..keep.recompute_kv import KVRecompute
from .barriers import Barrier
from .ditch_stream import DitchStream
from .seek import Seek
from .select import ScoreInputs, Selected
from .selection_plan import Selections
from .signals import Signals
from .token_loss import Traced

#: What is told of the rows of one token axis, by the fields of ``recording.Selection``.
Told = dict[str, Tensor]


@dataclass(frozen=True)
class ScoringTail:
    """The traced scoring tail; ``None``: neither the signals nor the reported loss need it. ``reports_full``: the loss that is returned
    has the value of the loss of all tokens."""

    traced: Traced | None = None
    reports_full: bool = False


@dataclass(frozen=True)
class PlanScoring:
    """Trace the scoring tail where a signal, or the loss of all tokens without logits, needs it. Reads ``Selections``; writes ``ScoringTail``."""

    signals: Signals
    logits: str = "keep"
    report_loss: str | None = None
    given: bool = False
    name: str = "scoring tail"

    def run(self, program: Program) -> Program:
        needs = frozenset() if self.given else program[Selections].needs
        full = (self.report_loss or ("full" if needs & {"gradient", "loss"} else "kept")) == "full"
        builds_no_logits = full and self.logits == "drop" and bool(program[Activity].losses)
        tail = None if self.given else self.signals.tail(program, needs, builds_no_logits)
        return program.with_(ScoringTail(tail, full))

    def check(self, program: Program) -> None:
        """Nothing to verify: its values are compared with an independent computation in the tests."""


@dataclass(frozen=True)
class Run:
    """One execution: the model's ``outputs``, what was ``selected`` on every token axis, the ``barriers``, the ``seek`` stream."""

    outputs: tuple[Any, ...]
    selected: tuple[Told, ...]
    barriers: tuple[Barrier, ...] = ()
    seek: Seek | None = None

    @property
    def flat(self) -> tuple[Any, ...]:
        return (*self.outputs, *(x for told in self.selected for x in told.values()))


@dataclass(frozen=True)
class TwoStreams:
    """``run(*inputs)``: the rewritten forward. ``inputs``: examples of its inputs, those of the program and then the rows that are
    given, or noise for the axes ``noisy`` (numbers)."""

    program: Program
    signals: Signals
    inputs: tuple[Any, ...]
    noisy: tuple[int, ...]
    logits: str
    kv_grad: str
    given: bool
    is_fragment: bool

    def run(self, *args: Any) -> Run:
        """Execute both streams; inputs that the forward mutates are written to."""
        program, count = self.program, len(self.program.inputs)
        written, extra = args[:count], args[count:]
        inputs = tuple(x.clone() if i in program.mutated else x for i, x in enumerate(written))
        seek = Seek(program, inputs, program[KVRecompute].sources)
        row_indices, selected = self._take(seek, *extra) if self.given else self._choose(seek, *extra)
        ditch = DitchStream(program, seek.values, row_indices, inputs, self.kv_grad, seek.cast)
        ditch.run()
        outputs = tuple(self._outputs(ditch))
        for index, update in zip(program.mutated, program.updates, strict=True):
            written[index].copy_(seek.values[update])
        return Run(outputs, tuple(selected), tuple(ditch.barriers), seek)

    def choose(self, *args: Any) -> Run:
        """Execute the seek stream as far as the choice needs it; nothing is written to."""
        count = len(self.program.inputs)
        _, selected = self._choose(Seek(self.program, args[:count]), *args[count:])
        return Run((), tuple(selected))

    def _choose(self, seek: Seek, *noise: Tensor) -> tuple[list[RowIndex], list[Told]]:
        """The rows by their scores, and what is told of them, for every token axis."""
        program, selects, axes = self.program, self.program[Selections].by_axis, self.program[TokenAxes]
        needs = {axis: select.needs for axis, select in selects.items()}
        drawn = dict(zip((axes.tokens[i] for i in self.noisy), noise, strict=True))
        known = seek.look(self.signals, needs, program[ScoringTail].traced, drawn)
        row_indices, selected = [], []
        for axis, select in selects.items():
            with tagged(Kind.SELECT):
                chosen = select(known[axis])
                if axis != axes.main or not weighted_losses(program):
                    chosen = chosen._replace(weights=None)
            sizes = known[axis].batch, known[axis].tokens
            row_indices.append(RowIndex(axes, axis, chosen.indices, *sizes, chosen.weights))
            selected.append(_told(known[axis], chosen))
        return row_indices, selected

    def _take(self, seek: Seek, *given: Tensor) -> tuple[list[RowIndex], list[Told]]:
        """The rows that were given, of which there is nothing to tell."""
        program, axes = self.program, self.program[TokenAxes]
        if len(axes.tokens) > 1:
            raise GraphNotSupported(
                f"Rows were given for one token axis, but the graph has {len(axes.tokens)}.",
                "Let the backend choose the rows of an encoder-decoder.",
            )
        indices, *weights = given if weighted_losses(program) else given[:1]
        sizes = sizes_of(program, axes.main, seek.values)
        return [RowIndex(axes, axes.main, indices, *sizes, *weights)], []

    def _outputs(self, ditch: DitchStream) -> Iterator[Any]:
        """Losses live, the rest as the full forward has it; without a loss, values in full that live in the kept rows."""
        program, activity = self.program, self.program[Activity]
        classes = class_factors(program)
        for out in program.outputs:
            if not isinstance(out, fx.Node):
                yield out
            elif out not in activity.live:
                yield ditch.seek[out]
            elif out in activity.losses:
                yield self._loss(ditch, out)
            elif self.is_fragment or not activity.losses:
                yield ditch.full(out)
            elif self.logits == "drop" and _are_logits(program, out, classes):
                yield _without_tokens(ditch, out)
            else:
                yield ditch.seek[out].detach()

    def _loss(self, ditch: DitchStream, out: fx.Node) -> Tensor:
        """The loss of the kept tokens, or the value of the full one with the gradient of the kept tokens."""
        kept = ditch.full(out)
        if not self.program[ScoringTail].reports_full:
            return kept
        return ditch.seek[out].detach() + (kept - kept.detach())


@dataclass(frozen=True)
class BuildStreams:
    """Make the function of the two streams.

    Reads ``Selections``, ``ScoringTail``, ``KVRecompute``, ``FrozenRows`` and the analysis; writes ``TwoStreams``. The options are those of
    ``Plan``; ``given``: examples of the rows [B, k] (and their weights).
    """

    signals: Signals
    logits: str = "keep"
    kv_grad: str = "selected"
    given: Sequence[Tensor] = ()
    is_fragment: bool = False
    name: str = "two streams"

    def run(self, program: Program) -> Program:
        noisy = () if self.given else program[Selections].noisy
        inputs = (*program.inputs, *(self.given or _noise(program, noisy)))
        form = (self.logits, self.kv_grad, bool(self.given), self.is_fragment)
        return program.with_(TwoStreams(program, self.signals, inputs, noisy, *form))

    def check(self, program: Program) -> None:
        """Nothing is computed yet."""


def _noise(program: Program, noisy: Sequence[int]) -> list[Tensor]:
    with fake_mode_of(program.inputs):
        shapes = [example_sizes(program, program[TokenAxes].tokens[i]) for i in noisy]
        return [torch.empty(shape, device=device_of(program)) for shape in shapes]


def _told(known: ScoreInputs, chosen: Selected) -> Told:
    signals = {name: getattr(known, name) for name in ("attention", "gradient", "loss", "labelled")}
    return {name: x for name, x in {**chosen._asdict(), **signals}.items() if x is not None}


def _are_logits(program: Program, node: fx.Node, classes: set[int]) -> bool:
    return program[TokenAxes].has_rows(node) and bool(classes & set(sum(program[TokenAxes].of(node), ())))


def _without_tokens(ditch: DitchStream, node: fx.Node) -> Tensor:
    """An empty tensor in place of ``node``, made without computing it."""
    value, row_index, axes = ditch.seek[node], ditch.row_index_of(node), ditch.axes
    sizes = {row_index.axis.token: 0, row_index.axis.batch: row_index.batch}
    shape = [sizes.get(label, size) if label else size for label, size in zip(axes.of(node), value.shape, strict=True)]
    return torch.empty(shape, dtype=value.dtype, device=value.device)
