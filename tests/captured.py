"""A graph captured and analysed once. Its two streams run on real tensors with any options, without being traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from programs import planned
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tokenseek_fx.compilation import refuse_fragment, refuse_split
from tokenseek_fx.compiled import fingerprints, selections_of
from tokenseek_fx.config import Config
from tokenseek_fx.outputs import without_gradient
from tokenseek_fx.passes import Program, training
from tokenseek_fx.passes.analysis.row_index import runtime_sizes
from tokenseek_fx.passes.analysis.token_axes import TokenAxes
from tokenseek_fx.passes.lower.split import Segments
from tokenseek_fx.passes.memory.saved import SavedTensors
from tokenseek_fx.passes.pipeline import ANALYSED
from tokenseek_fx.passes.streams.two_streams import TwoStreams
from tokenseek_fx.recording import Selection, selection

_captured: WeakKeyDictionary[nn.Module, dict[Any, Captured]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Captured:
    """The analysed ``program`` of ``model``, which is a copy.

    ``args``: the arguments with which Dynamo called the graph; ``places``: the positions of the batch's tensors in
    them, by name. ``output_of`` builds the output of the model from those of the graph. ``traced``: the programs that
    ``trace`` rewrote, in order.
    """

    model: nn.Module
    program: Program
    args: tuple[Any, ...]
    places: dict[str, int]
    output_of: Callable[[Sequence[Any]], Any]
    traced: list[Program] = field(default_factory=list)

    def execute(self, batch: dict[str, Any], config: Config) -> tuple[Any, Selection]:
        """The output of the two streams, executed as a function, and the selection."""
        program = training(config.plan()).run(self.program, until="two streams")
        args = self._args(batch)
        run = program[TwoStreams].run(*args, *_noise(program, args, config.seed))
        return self._result(program, args, run.outputs, run.selected)

    def trace(self, batch: dict[str, Any], config: Config) -> tuple[Any, Selection]:
        """The same for the graph traced from them, in its segments."""
        program = training(config.plan()).run(self.program)
        self.traced.append(program)
        args = self._args(batch)
        outputs = program[Segments](*args, *_noise(program, args, config.seed))
        count = len(program.outputs)
        return self._result(program, args, outputs[:count], selections_of(program, outputs[count:]))

    def saved(self, config: Config) -> SavedTensors:
        """What the segments of the rewritten graph save."""
        return SavedTensors(training(config.plan()).run(self.program)[Segments])

    def _args(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        self.model.zero_grad(set_to_none=True)
        args = dict(enumerate(self.args)) | {place: batch[name] for name, place in self.places.items()}
        return tuple(x.clone() if i in self.program.mutated else x for i, x in args.items())

    def _result(self, program: Program, args: Sequence[Any], outputs: Sequence[Any], selected: Sequence[Any]) -> Any:
        first, *others = selected
        seen = selection({**first, **fingerprints(program)(args)}, *others)
        return self.output_of(without_gradient(program)(outputs)), seen


def captured(model: nn.Module, batch: dict[str, Any]) -> Captured:
    """The graph of ``model(**batch)``, captured once for each model and form of the batch."""
    known, key = _captured.setdefault(model, {}), _form(model, batch)
    if key not in known:
        known[key] = _capture(model, batch)
    return known[key]


def _form(model: nn.Module, batch: dict[str, Any]) -> Any:
    """What a graph depends on, and the versions of the parameters that were copied."""
    inputs = [
        (name, x.shape, x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else (name, x)
        for name, x in batch.items()
    ]
    parameters = [(p.data_ptr(), p._version, p.requires_grad) for p in (*model.parameters(), *model.buffers())]
    return tuple(inputs), tuple(parameters), tuple(module.training for module in model.modules())


def _capture(model: nn.Module, batch: dict[str, Any]) -> Captured:
    torch._dynamo.reset()
    model, found = copy.deepcopy(model), []

    def look(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        refuse_split(gm)
        program = training(planned()).run(Program(gm, tuple(inputs)), until=ANALYSED)
        refuse_fragment(program, inputs)

        def run(*args: Any) -> Any:
            unwritten = tuple(x.clone() if i in program.mutated else x for i, x in enumerate(args))
            found.append((program, unwritten, gm(*args)))
            return found[-1][2]

        return run

    output = torch.compile(model, backend=look, dynamic=False)(**batch)
    ((program, args, outputs),) = found
    numbers = {id(x): i for i, x in enumerate(args)}
    places = {name: numbers[id(x)] for name, x in batch.items() if isinstance(x, Tensor) and id(x) in numbers}
    return Captured(model, program, args, places, _rebuilding(output, outputs))


def _rebuilding(output: Any, outputs: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """A function that puts outputs of the graph where they are in ``output``."""
    leaves, structure = pytree.tree_flatten(output)
    numbers = {id(x): i for i, x in enumerate(outputs) if isinstance(x, Tensor)}
    places = [numbers.get(id(leaf)) for leaf in leaves]
    others = [leaf if place is None else None for leaf, place in zip(leaves, places, strict=True)]
    assert not any(isinstance(x, Tensor) and x.requires_grad for x in others), "an output that is no value of the graph"

    def rebuilt(values: Sequence[Any]) -> Any:
        filled = (other if place is None else values[place] for other, place in zip(others, places, strict=True))
        return pytree.tree_unflatten([*filled], structure)

    return rebuilt


def _noise(program: Program, args: Sequence[Any], seed: int | None) -> Iterator[Tensor]:
    """Uniform numbers [B, T] for every token axis whose scorer draws, as ``compiled.noise_for`` draws them."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for axis in program[TwoStreams].noisy:
        yield torch.rand(runtime_sizes(program, program[TokenAxes].tokens[axis])(args), generator=generator)
