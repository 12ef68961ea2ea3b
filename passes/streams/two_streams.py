"""Two streams: the forward executed twice, for all tokens without gradient and for the kept rows with gradient.

1. **Seek stream**: every input is detached. It returns the values of the forward, the keys and values of each
attention, and the signals.
2. **Select**: scores -> sorted row indices ``[B, k]``.
3. **Ditch stream**: every live operation is re-executed on the kept rows (``rows/``). Where tokens mix, it reads the
full values of the seek stream, with its own rows scattered into them. An operation that can't be restricted is a
*barrier*: it runs in full on such values, and its rows are gathered from the result. A barrier is exact, saves less
memory, and is reported.

The function runs on real tensors; ``trace.py`` makes a graph of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from ..graph.traced import nodes_kept
from ..keep.recompute_kv import KVRecompute
from .barriers import Barrier
from .ditch_stream import DitchStream
from .round_stream import RoundStream, round_inputs
from .rounds import Rounds
from .seek import Seek
from .select import ScoreInputs, Selected
from .selection_plan import Selections
from .signals import Signals
from .token_loss import Traced

#: What is recorded about the rows of one token axis, by the fields of ``recording.Selection``.
Told = dict[str, Tensor]


@dataclass(frozen=True)
class ScoringTail:
    """The scoring tail of the rewritten forward.

    Args:
        traced: the traced tail; ``None``: neither the signals nor the reported loss need it.
        reports_full: the returned loss has the value of the loss of all tokens.
    """

    traced: Traced | None = None
    reports_full: bool = False


@dataclass(frozen=True)
class PlanScoring:
    """Trace the scoring tail if a signal, or the loss of all tokens, needs it.

    Reads ``Selections``, ``Rounds``, ``TokenAxes``, ``Activity``, ``Blocks``; writes ``ScoringTail``. The options are
    those of ``Plan``; ``given``: rows are given, so nothing is scored.

    Raises:
        GraphNotSupported: the graph has no loss for a signal that needs one.
    """

    signals: Signals
    logits: str = "keep"
    report_loss: str | None = None
    given: bool = False
    name: str = "scoring tail"

    def run(self, program: Program) -> Program:
        needs = frozenset() if self.given else program[Selections].needs
        in_full = needs & {"gradient", "loss"} or program[Rounds].phases
        full = (self.report_loss or ("full" if in_full else "kept")) == "full"
        builds_no_logits = full and self.logits == "drop" and bool(program[Activity].losses)
        tail = None if self.given else self.signals.tail(program, needs, builds_no_logits)
        return program.with_(ScoringTail(tail, full))

    def check(self, program: Program) -> None:
        """Nothing to verify: the tests compare its values with an independent computation."""


@dataclass(frozen=True)
class Round:
    """The results of one round.

    Args:
        indices: the rows of the round.
        outputs: the outputs of the model that it computes a part of: rows, or the part of a sum.
        sent: its rows of the keys and values that other rounds read.
        block: the number of its first block.
        missing: what it read of other rounds although nothing collects the gradient.
        barriers: its barriers.
    """

    indices: Tensor
    outputs: tuple[Tensor, ...]
    sent: tuple[Tensor, ...]
    block: int
    missing: tuple[fx.Node, ...]
    barriers: tuple[Barrier, ...]

    @property
    def flat(self) -> tuple[Tensor, ...]:
        return (self.indices, *self.outputs, *self.sent)


@dataclass(frozen=True)
class Run:
    """One execution of the two streams.

    Args:
        outputs: the outputs of the model.
        selected: what is recorded about the rows of every token axis.
        barriers: the barriers of the ditch stream.
        seek: the seek stream.
        rounds: the results of a round of every phase, if the rows run in rounds.
    """

    outputs: tuple[Any, ...]
    selected: tuple[Told, ...]
    barriers: tuple[Barrier, ...] = ()
    seek: Seek | None = None
    rounds: tuple[Round, ...] = ()

    @property
    def flat(self) -> tuple[Any, ...]:
        """The outputs of the graph: those of the model, what is recorded about the rows, and those of the rounds."""
        told = (x for told in self.selected for x in told.values())
        return (*self.outputs, *told, *(x for one in self.rounds for x in one.flat))


@dataclass(frozen=True)
class TwoStreams:
    """The rewritten forward, ``run(*inputs)``.

    Args:
        program: the analysed program.
        signals: the signals that scores are computed from.
        inputs: example inputs: those of the program, then the given rows, or noise for the axes ``noisy``, then those
            of a round (``Rounds.inputs``).
        noisy: the numbers of the token axes whose selection needs noise.
        logits, kv_grad, is_fragment: as in ``Plan``.
        given: the rows are inputs.
    """

    program: Program
    signals: Signals
    inputs: tuple[Any, ...]
    noisy: tuple[int, ...]
    logits: str
    kv_grad: str
    given: bool
    is_fragment: bool

    def run(self, *args: Any) -> Run:
        """Execute both streams. Inputs that the forward mutates are mutated."""
        program, count = self.program, len(self.program.inputs)
        written, extra = args[:count], args[count:]
        inputs = tuple(x.clone() if i in program.mutated else x for i, x in enumerate(written))
        before = len(extra) - program[Rounds].inputs
        seek = Seek(program, inputs, program[KVRecompute].sources)
        row_indices, selected = self._take(seek, *extra[:before]) if self.given else self._choose(seek, *extra[:before])
        if program[Rounds].phases:
            ditch, rounds = None, tuple(self._rounds(seek, row_indices, inputs, *extra[before:]))
            barriers = tuple(barrier for one in rounds for barrier in one.barriers)
        else:
            ditch, rounds = DitchStream(program, seek.values, row_indices, inputs, self.kv_grad, seek.cast), ()
            ditch.run()
            barriers = tuple(ditch.barriers)
        outputs = tuple(self._outputs(seek, ditch))
        for index, update in zip(program.mutated, program.updates, strict=True):
            written[index].copy_(seek.values[update])
        return Run(outputs, tuple(selected), barriers, seek, rounds)

    def _rounds(
        self, seek: Seek, kept: list[RowIndex], inputs: tuple, places: Tensor, *leaves: Tensor
    ) -> Iterator[Round]:
        """One round of every phase. ``places`` of the rows and ``leaves``: as in ``RoundStream``."""
        program, block = self.program, 1
        collecting = dict(zip(program[Rounds].collected, leaves, strict=True))
        for phase in program[Rounds].phases:
            own = {node: collecting[node] for node in phase.read}
            stream = RoundStream(
                program, seek.values, inputs, seek.cast, phase, kept, own, places if phase.in_rounds else None
            )
            with nodes_kept((*inputs, *seek.values.values(), *(index.indices for index in kept))):
                after = stream.run(block) + 1
                outputs = tuple(map(stream.own, (program.outputs[i] for i in phase.outputs)))
                sent = tuple(map(stream.own, phase.sent))
            missing, barriers = tuple(dict.fromkeys(stream.missing)), tuple(stream.barriers)
            yield Round(stream.row_index(phase.axis), outputs, sent, block, missing, barriers)
            block = after

    @property
    def collecting(self) -> tuple[Any, ...]:
        """The inputs that collect gradient of keys and values."""
        return self.inputs[len(self.inputs) - len(self.program[Rounds].collected) :]

    def reading(self, missing: Sequence[Sequence[fx.Node]]) -> TwoStreams:
        """The same streams, whose phases collect the gradient of these values too."""
        program = self.program.with_(self.program[Rounds].reading(self.program, missing))
        before = len(self.inputs) - self.program[Rounds].inputs
        return replace(self, program=program, inputs=(*self.inputs[:before], *round_inputs(program)))

    def choose(self, *args: Any) -> Run:
        """Execute the seek stream and the selection only; nothing is mutated."""
        count = len(self.program.inputs)
        _, selected = self._choose(Seek(self.program, args[:count]), *args[count:])
        return Run((), tuple(selected))

    def _choose(self, seek: Seek, *noise: Tensor) -> tuple[list[RowIndex], list[Told]]:
        """For every token axis, the rows selected by their scores and what is recorded about them."""
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
        """The given rows; nothing is recorded about them."""
        program, axes = self.program, self.program[TokenAxes]
        if len(axes.tokens) > 1:
            raise GraphNotSupported(
                f"Rows were given for one token axis, but the graph has {len(axes.tokens)}.",
                "Let the backend choose the rows of an encoder-decoder.",
            )
        indices, *weights = given if weighted_losses(program) else given[:1]
        sizes = sizes_of(program, axes.main, seek.values)
        return [RowIndex(axes, axes.main, indices, *sizes, *weights)], []

    def _outputs(self, seek: Seek, ditch: DitchStream | None) -> Iterator[Any]:
        """The outputs: losses live, other values from the seek stream.

        Without a loss, and in a fragment, values are full values that are live in the kept rows. Without a ditch stream
        (rounds), all are values of the seek stream.
        """
        program, activity = self.program, self.program[Activity]
        classes = class_factors(program)
        for out in program.outputs:
            if not isinstance(out, fx.Node):
                yield out
            elif out not in activity.live:
                yield seek.values[out]
            elif ditch is not None and out in activity.losses:
                yield self._loss(ditch, out)
            elif ditch is not None and (self.is_fragment or not activity.losses):
                yield ditch.full(out)
            elif self.logits == "drop" and _are_logits(program, out, classes):
                yield _without_tokens(program[TokenAxes], seek, out)
            else:
                yield seek.values[out].detach()

    def _loss(self, ditch: DitchStream, out: fx.Node) -> Tensor:
        """The loss of the kept tokens, or the value of the full loss with the gradient of the kept tokens."""
        kept = ditch.full(out)
        if not self.program[ScoringTail].reports_full:
            return kept
        return ditch.seek[out].detach() + (kept - kept.detach())


@dataclass(frozen=True)
class BuildStreams:
    """Build the function that executes the two streams.

    Reads ``Selections``, ``Rounds``, ``ScoringTail``, ``KVRecompute``, ``FrozenRows`` and the results of the analysis;
    writes ``TwoStreams``. The options are those of ``Plan``; ``given``: examples of row indices [B, k] (and their
    weights).
    """

    signals: Signals
    logits: str = "keep"
    kv_grad: str = "selected"
    given: Sequence[Tensor] = ()
    is_fragment: bool = False
    name: str = "two streams"

    def run(self, program: Program) -> Program:
        noisy = () if self.given else program[Selections].noisy
        inputs = (*program.inputs, *(self.given or _noise(program, noisy)), *round_inputs(program))
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


def _without_tokens(axes: TokenAxes, seek: Seek, node: fx.Node) -> Tensor:
    """An empty tensor in place of ``node``, created without computing the node."""
    axis = axes.axis_of(node)
    assert axis is not None
    value, (batch, _) = seek.values[node], sizes_of(seek.program, axis, seek.values)
    sizes = {axis.token: 0, axis.batch: batch}
    shape = [sizes.get(label, size) if label else size for label, size in zip(axes.of(node), value.shape, strict=True)]
    return torch.empty(shape, dtype=value.dtype, device=value.device)
