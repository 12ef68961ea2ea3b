"""The rounds of a rewritten graph: the prefill runs in the forward, and the kept rows run in the backward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from . import compat
from .passes.analysis.row_index import RowIndex, example_sizes
from .passes.analysis.token_axes import TokenAxes
from .passes.graph.errors import RoundsNotSupported
from .passes.graph.program import Program
from .passes.lower.split import Segment, Segments, run_each
from .passes.pipeline import Pass, training
from .passes.plan import Plan
from .passes.streams.round_stream import collecting
from .passes.streams.rounds import Phase, Rounds
from .passes.streams.trace import Rewrite
from .warnings import TokenSeekWarning

Values = dict[Any, Any]


def rewrite(program: Program, plan: Plan, after: Pass | None = None) -> Program:
    """The program after the passes of ``plan`` and ``after``; with one round, and a warning, if several are not exact.

    Raises:
        RoundsNotSupported: they are not exact, and ``plan.strict`` is set.
    """
    try:
        return (training(plan) if after is None else training(plan) + after).run(program)
    except RoundsNotSupported as error:
        if plan.strict:
            raise
        fact = f"tokenseek: rounds={plan.rounds}: {error} Compiled with one round."
        warnings.warn(fact, TokenSeekWarning, stacklevel=2)
        return rewrite(program, replace(plan, rounds=1), after)


class InRounds:
    """Compiled segments whose backward runs the kept rows in rounds.

    The forward runs the seek stream and the selection. Saved for backward are the inputs and what the rounds read of
    them: keys and values, labels, the kept rows.
    """

    def __init__(self, segments: Segments, program: Program) -> None:
        self.segments, self.program, self.rounds = segments, program, program[Rounds]
        first, *others = segments.phases
        self.before = segments.segments[:first]
        ends = (*others, len(segments.segments))
        #: For every phase its segments and the outputs of a round, which follow those of a call.
        self.phases: list[tuple[Phase, tuple[Segment, ...], tuple[Any, ...]]] = []
        self.returned, counts = segments.outputs, [count for count, _ in program[Rewrite].rounds]
        for phase, start, end, count in [*zip(self.rounds.phases, segments.phases, ends, counts, strict=True)][::-1]:
            self.returned, results = self.returned[:-count], self.returned[-count:]
            self.phases.insert(0, (phase, segments.segments[start:end], results))
        self.given = len(segments.placeholders) - self.rounds.inputs
        self.examples = segments.inputs[self.given :]
        self.read = {key for segment in segments.segments[first:] for key in segment.takes}
        self.live = {position for phase in self.rounds.phases for position in phase.outputs}

    def __call__(self, *args: Any) -> Sequence[Any]:
        return _InRounds.apply(self, *args)

    # -- forward ------------------------------------------------------------------------------------------------------

    def prefill(self, args: Sequence[Any]) -> tuple[list[Any], Values]:
        """The outputs of a call, and the values that its rounds read."""
        values = self.segments.known((*args, *self.examples))
        run_each(self.before, values)
        outputs = [values[x] if isinstance(x, fx.Node) else x for x in self.returned]
        inputs = dict(zip(self.segments.placeholders, args, strict=False))
        return outputs, inputs | {key: value for key, value in values.items() if key in self.read}

    # -- backward -----------------------------------------------------------------------------------------------------

    def backward(self, values: Values, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradient of the inputs of a call.

        Args:
            values: the inputs and what the rounds read.
            grads: the gradient of the outputs of the call.
        """
        inputs = self.segments.placeholders[: self.given]
        leaves = {key: _leaf(values[key]) for key in inputs if _is_trained(values[key])}
        args = [leaves.get(key, values[key]) for key in inputs]
        leaves_of_keys = [_collected(example) for example in self.examples[1:]]
        collected = dict(zip(self.rounds.collected, leaves_of_keys, strict=True))
        for phase, segments, results in self.phases:
            for places in self._places(phase):
                known = {**values, **self.segments.known((*args, places, *leaves_of_keys))}
                with torch.enable_grad():
                    run_each(segments, known)
                self._send(phase, [known[x] for x in results], grads, collected, places)
        self._check(collected)
        return [_found(leaves[key], values[key]) if key in leaves else None for key in inputs]

    def _places(self, phase: Phase) -> Iterator[Tensor]:
        """The places of the rows of every round among the kept rows, the last rows first."""
        kept = torch.arange(self.rounds.kept[phase.axis], device=self.examples[0].device)
        yield from reversed(kept.split(self.rounds.parts(len(kept)))) if phase.in_rounds else [kept]

    def _send(
        self,
        phase: Phase,
        found: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        collected: Mapping[fx.Node, Tensor],
        places: Tensor,
    ) -> None:
        """Run the backward of a round: of its rows of the outputs, and of the keys and values that others read."""
        indices, *results = found
        wanted = [self._rows_of(grads[i], self.program.outputs[i], phase, indices) for i in phase.outputs]
        wanted += [self._consumed(_grad(collected[node]), node, places) for node in phase.sent]
        pairs = [(x, grad) for x, grad in zip(results, wanted, strict=True) if grad is not None and x.requires_grad]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))

    def _consumed(self, grad: Tensor, node: fx.Node, places: Tensor) -> Tensor:
        """The collected gradient of the rows of a round, which are set to 0: no later round may send them any."""
        axes = self.program[TokenAxes]
        axis, dim, labels = axes.axis_of(node), axes.row_dim(node), axes.of(node)
        assert axis is not None and dim is not None
        batch, _ = example_sizes(self.program, axis)
        index = RowIndex(axes, axis, places.expand(batch, -1), batch, self.rounds.kept[axis])
        rows = index.take(grad, labels, dim)
        if node in self.rounds.unproved:
            grad.copy_(index.put(grad, torch.zeros_like(rows), labels, dim))
        return rows

    def _check(self, collected: Mapping[fx.Node, Tensor]) -> None:
        """Check that no row sent gradient to a row of an earlier round.

        Raises:
            RoundsNotSupported: some row did.
        """
        for node in self.rounds.unproved:
            grad = _grad(collected[node])
            if not isinstance(grad, FakeTensor) and (grad.abs() > 0).any():  # not NaN, which a scaled gradient may be
                raise RoundsNotSupported(
                    "A row sent gradient to a later row, whose round was over: tokens attend, or are mixed, in both "
                    "directions. The gradient of this step is not complete.",
                    "Use rounds=1.",
                    node,
                )

    def _rows_of(self, grad: Tensor | None, output: fx.Node, phase: Phase, indices: Tensor) -> Tensor | None:
        """The rows of the gradient of an output; all of it if the output has no rows."""
        axes = self.program[TokenAxes]
        if grad is None or not axes.has_rows(output):
            return grad
        index = RowIndex(axes, phase.axis, indices, *example_sizes(self.program, phase.axis))
        dim = axes.row_dim(output)
        assert dim is not None
        return index.take(grad, axes.of(output), dim)


class _InRounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: InRounds, *args: Any) -> tuple[Any, ...]:
        outputs, values = graph.prefill(args)
        ctx.graph, ctx.keys = graph, [key for key, x in values.items() if isinstance(x, Tensor)]
        ctx.others = {key: x for key, x in values.items() if not isinstance(x, Tensor)}
        ctx.save_for_backward(*map(values.__getitem__, ctx.keys))
        ctx.set_materialize_grads(False)
        still = (x for i, x in enumerate(outputs) if isinstance(x, Tensor) and i not in graph.live)
        ctx.mark_non_differentiable(*still)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        values = {**dict(zip(ctx.keys, ctx.saved_tensors, strict=True)), **ctx.others}
        return (None, *ctx.graph.backward(values, grads))


def _is_trained(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _leaf(value: Tensor) -> Tensor:
    """A leaf with the memory of an input.

    The rounds add up its gradient, if possible directly in the gradient of the input, so that there is no second one.
    """
    leaf = value.detach().requires_grad_()
    if compat.adds_to_grad(value):
        leaf.grad = value.grad
    return leaf


def _found(leaf: Tensor, value: Tensor) -> Tensor | None:
    """The gradient of an input; ``None`` if it was added to that of the input."""
    return None if leaf.grad is not None and leaf.grad is value.grad else leaf.grad


def _collected(example: Tensor) -> Tensor:
    """A tensor that collects the gradient of the kept rows of keys or values."""
    leaf = collecting(torch.zeros((), dtype=example.dtype, device=example.device), example.shape)
    leaf.grad = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    return leaf


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
