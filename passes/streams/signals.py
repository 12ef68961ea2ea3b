"""Signals: the quantities that scores are computed from, one function per signal.

A signal is a function ``(Prefill) -> [B, T]`` of the seek stream. Only signals that a scorer requests with ``needs``
are computed. Values of the seek stream that nothing reads are dropped from the graph, so a scorer that needs only
attention runs neither the last MLP nor the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..analysis.activity import Activity, FindActivity
from ..analysis.attentions import Attention
from ..analysis.blocks import Blocks, FindBlocks
from ..analysis.row_index import RowIndex
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..attention.positional import PositionalAttentions
from ..attention.received import received_in
from ..graph.errors import GraphNotSupported
from ..graph.program import Program
from .scoring_tail import find_tail, head_input
from .select import SIGNALS
from .token_loss import TokenSignals, Traced, trace_tail

_OTHERS = 'Choose scorer="attention" or scorer="random", which need neither.'


@dataclass(frozen=True)
class Signals:
    """Options of the signals.

    Args:
        attention_layers: the attentions that count: "last", "first", "all" or their numbers (negative: from the end);
            several are summed.
        gradient_of: "last_block", the input of the last block, or "head", that of the head.
        pinned: positions that are always kept (negative: from the end).
        chunk_bytes: bytes of the largest intermediate value of the chunked head.
    """

    attention_layers: str | tuple[int, ...] = "last"
    gradient_of: str = "last_block"
    pinned: tuple[int, ...] = ()
    chunk_bytes: int = 12 * 2**20

    def attentions(self, program: Program, axis: TokenAxis) -> tuple[Attention, ...]:
        """The attentions that count for the tokens of an axis, out of those that read them as keys.

        Raises:
            GraphNotSupported: there are none, or a number in ``attention_layers`` does not exist.
        """
        layers: dict[fx.Node, list[Attention]] = {}  # softmaxes that share a product with values are one attention
        for attention in program[TokenAxes].attentions:
            if program[TokenAxes].keys_of(attention) == axis:
                layers.setdefault(attention.out, []).append(attention)
        every = tuple(layers.values())
        if not every:
            raise GraphNotSupported("No attention reads these tokens as keys.", 'Choose scorer="random".')
        return tuple(attention for layer in self._counted(every) for attention in layer)

    def _counted(self, every: tuple[list[Attention], ...]) -> Iterable[list[Attention]]:
        if isinstance(self.attention_layers, str):
            return {"last": every[-1:], "first": every[:1], "all": every}[self.attention_layers]
        if bad := [i for i in self.attention_layers if not -len(every) <= i < len(every)]:
            raise GraphNotSupported(
                f"attention_layers={bad}: attentions of the model: {len(every)}.",
                "Number them from 0, or from -1 at the end.",
            )
        return [every[i] for i in self.attention_layers]

    def tail(self, program: Program, needs: Iterable[str], full_loss: bool) -> Traced | None:
        """The traced scoring tail, if the signals ``needs`` or the ``full_loss`` require it, else ``None``.

        Raises:
            GraphNotSupported: the graph has no loss, or none over tokens for a signal that needs one.
        """
        wanted = {SIGNALS[name].tail for name in needs} - {None}
        if not (wanted or full_loss):
            return None
        if not program[Activity].losses:
            raise GraphNotSupported("The graph has no loss, so tokens have neither a loss nor a gradient.", _OTHERS)
        gradient = "gradient" in wanted
        tail = find_tail(*self._starts(program, gradient))
        if tail.loss is None and "loss" in wanted:
            raise GraphNotSupported(
                "The loss is not a single cross entropy over tokens, so a token has no loss of its own.", _OTHERS
            )
        return trace_tail(tail, gradient, self.chunk_bytes) if gradient or tail.loss is not None else None

    def has_gradient(self, program: Program, axis: TokenAxis) -> bool:
        """True if the tokens of an axis have a gradient; those of a further axis have one only at the last block."""
        program, starts = self._starts(program, gradient=True)
        return any(program[TokenAxes].axis_of(node) == axis for node in find_tail(program, starts).starts)

    def _starts(self, program: Program, gradient: bool) -> tuple[Program, list[fx.Node]]:
        """The program with all parameters treated as trained, and the starts of the tail.

        The start of the first token axis is first. Scores don't depend on which parameters are trained.
        """
        program = FindBlocks().run(FindActivity(frozen_too=True).run(program))
        block = gradient and self.gradient_of == "last_block"
        axes, blocks = program[TokenAxes], program[Blocks]
        first = blocks.last_entry(axes, axes.main) if block else head_input(program)
        if first is None and block and not axes.attentions:
            raise GraphNotSupported(
                "The model has no attention, so its last block is not known.",
                'Set gradient_of="head", or choose scorer="loss" or scorer="random".',
            )
        if first is None:
            raise GraphNotSupported(
                "No value with token rows is on every path to the loss, so no block can be scored.", _OTHERS
            )
        others = [blocks.last_entry(axes, axis) for axis in axes.tokens[1:]] if block else []
        return program, [first, *(entry for entry in others if entry is not None)]


@dataclass(frozen=True)
class Prefill:
    """What a signal may read: the values of the seek stream, for the tokens of one axis.

    Args:
        program: the program.
        values: the values of the seek stream.
        row_index: all rows of the axis, with its sizes.
        signals: the options.
        tail: loss and gradient of every token, if a signal requested them.
        noise: float32 [B, T], uniform in [0, 1), if requested.
    """

    program: Program
    values: Mapping[fx.Node, Any]
    row_index: RowIndex
    signals: Signals
    tail: TokenSignals
    noise: Tensor | None = None


@dataclass(frozen=True)
class Signal:
    """One signal.

    Args:
        compute: ``compute(prefill) -> [B, T]`` or ``None``.
        tail: "loss" or "gradient", if it needs one of these from the scoring tail.
    """

    compute: Callable[[Prefill], Tensor | None]
    tail: str | None = None


def signal(name: str, tail: str | None = None) -> Callable[[Callable[[Prefill], Tensor | None]], Any]:
    """Register a signal that scorers request with ``@needs(name)``.

    Raises:
        ValueError: another signal has the name.

    >>> @signal("first")  # doctest: +SKIP
    ... def first(prefill):
    ...     return (prefill.row_index.indices == 0).float()
    """

    def register(compute: Callable[[Prefill], Tensor | None]) -> Callable[[Prefill], Tensor | None]:
        SIGNALS.register([name], Signal(compute, tail))
        return compute

    return register


@signal("attention")
def attention(prefill: Prefill) -> Tensor:
    """Attention that a token receives, summed over queries, heads and the layers that count (TokenSeek's I1)."""
    looking = prefill.signals.attentions(prefill.program, prefill.row_index.axis)
    positional = prefill.program[PositionalAttentions]
    return sum(  # type: ignore[return-value]
        received_in(a, positional.get(a.out), prefill.values, prefill.row_index) for a in looking
    )


@signal("gradient", tail="gradient")
def gradient(prefill: Prefill) -> Tensor | None:
    """Sum over the hidden dim of the absolute gradient of the full loss at the token (TokenSeek's I2)."""
    return prefill.tail.gradients.get(prefill.row_index.axis)


@signal("loss", tail="loss")
def loss(prefill: Prefill) -> Tensor | None:
    """The loss of the token, 0 without a label; only on the token axis of the loss."""
    return prefill.tail.loss if prefill.row_index.axis == prefill.program[TokenAxes].main else None


@signal("noise")
def noise(prefill: Prefill) -> Tensor | None:
    """Uniform noise, drawn outside the graph."""
    return prefill.noise
