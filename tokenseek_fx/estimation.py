"""Estimate: the memory of a training step, computed on fake tensors without running the model."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .compilation import compile_segments, inner_compiler, refuse_split, trains
from .compiled import Rewritten
from .config import Config
from .explanation import first_graph
from .memory import StepMemory, planned_for, step_memory
from .passes.graph.errors import ConfigError, GraphNotSupported, TokenSeekError
from .passes.graph.nodes import hint
from .passes.graph.program import Program
from .passes.lower.chunks import CHUNK_BYTES
from .passes.pipeline import ANALYSED, training
from .planner import within_budget
from .rounds import rewrite

#: Nominal memory of GPUs in 10^9 bytes. What they have beyond it is left to the driver and the allocator.
GPUS = (24, 48, 80, 141)
#: State of PyTorch's optimizers: tensors of the parameter's size that each parameter has.
_STATES = {"adamw": 2, "adam": 2, "sgd": 0}
#: Temporaries of an update: tensors of the parameter's size (the denominator, from ``sqrt(v)``, and the quotient).
_TEMPORARIES = {"adamw": 2, "adam": 2, "sgd": 0}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step. ``str()`` of it is the report.

    Attributes:
        parameters: parameters and buffers.
        gradients: gradients of all trainable parameters.
        optimizer: states of the optimizer.
        update: temporaries of the optimizer while it updates.
        inputs: the batch.
        step: the compiled forward and backward with token selection.
        plain: the same of ``torch.compile`` on all tokens; ``None`` with ``plain=False``.
        set_to_none: gradients are freed before each forward (``optimizer.zero_grad()``) and allocated in the backward.
    """

    parameters: int
    gradients: int
    optimizer: int
    update: int
    inputs: int
    step: StepMemory
    plain: StepMemory | None = field(default=None)
    set_to_none: bool = True

    @property
    def peak(self) -> int:
        """Peak bytes of a step: the largest of forward, backward and update."""
        return max(self.phases().values())

    @property
    def plain_peak(self) -> int | None:
        """The same with plain ``torch.compile``; ``None`` if it was not estimated."""
        return max(self.phases(self.plain).values()) if self.plain else None

    def phases(self, step: StepMemory | None = None) -> dict[str, int]:
        """Peak bytes in "forward", "backward" and "update", parameters and states included."""
        step = step or self.step
        always = self.parameters + self.inputs + self.optimizer
        kept = 0 if self.set_to_none else self.gradients
        return {
            "forward": always + kept + step.forward,
            "backward": always + kept + step.backward,
            "update": always + self.gradients + self.update,
        }

    def fits(self, size: str | int) -> bool:
        """True if the step fits into ``size`` bytes: a number, or text such as "24GiB" (2^30) or "24GB" (10^9).

        Raises:
            ConfigError: ``size`` is invalid.
        """
        return self.peak <= bytes_of(size)

    def __str__(self) -> str:
        steps = {"tokenseek": self.step} | ({"torch.compile": self.plain} if self.plain else {})
        phases = [self.phases(step) for step in steps.values()]
        kinds = sorted({kind for step in steps.values() for kind in step.saved})
        rows = [
            *(
                (name, [getattr(self, name)] * len(steps))
                for name in ("parameters", "inputs", "gradients", "optimizer")
            ),
            ("saved for backward", [sum(step.saved.values()) for step in steps.values()]),
            *((f"  {kind}", [step.saved.get(kind, 0) for step in steps.values()]) for kind in kinds),
            *((f"peak, {name}", [each[name] for each in phases]) for name in phases[0]),
            ("peak", [max(each.values()) for each in phases]),
        ]
        head = f"{'memory of a step (MiB)':<26}" + "".join(f"{name:>16}" for name in steps)
        lines = [f"{name:<26}" + "".join(f"{value / 2**20:>16.1f}" for value in values) for name, values in rows]
        return "\n".join([head, *lines, *(self._fit(gpu, phases) for gpu in GPUS)])

    def _fit(self, gpu: int, phases: Sequence[Mapping[str, int]]) -> str:
        answers = ("yes" if max(each.values()) <= gpu * 10**9 else "no" for each in phases)
        return f"{f'fits in {gpu} GB':<26}" + "".join(f"{answer:>16}" for answer in answers)


def estimate(
    model: torch.nn.Module,
    batch: int | Mapping[str, Any],
    seq: int | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    optimizer: str | float | None = "adamw",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    plain: bool = True,
    set_to_none: bool = True,
) -> Estimate:
    """Estimate the memory of a training step of ``model``. Nothing is computed, and no activation is allocated.

    Args:
        model: Real, on the meta device (``with torch.device("meta")``), or created under a ``FakeTensorMode``.
        batch: Example inputs by name, or the number of sequences for a model that takes ``input_ids`` and ``labels``.
        seq: Tokens in each sequence, if ``batch`` is a number.
        options: Fields of ``Config``.
        optimizer: "adamw", "adam", "sgd", bytes of state for each element of trainable parameters, or ``None`` for a
            step without update.
        dtype: Convert floating-point parameters to this dtype first.
        device: "cpu" or "cuda": the device to estimate for, if the model is not on a GPU.
        plain: Estimate ``torch.compile`` on all tokens too.
        set_to_none: As in ``optimizer.zero_grad``; ``False`` if gradients stay allocated.

    Raises:
        ConfigError: an argument or option is invalid.
        GraphNotSupported: the model can't be rewritten, or it is not one graph.

    >>> estimate(model, batch=8, seq=4096, device="cuda").fits("24GiB")  # doctest: +SKIP
    """
    config = _checked(Config.from_options(options))
    states, temporaries = _optimizer(optimizer)
    if device not in CHUNK_BYTES:
        raise ConfigError(f"device={device!r}: expected {' or '.join(map(repr, CHUNK_BYTES))}.")
    model, mode = traceable(getattr(model, "_orig_mod", model), dtype)
    inputs = on_device(_inputs(model, batch, seq), mode)
    found: list[tuple[StepMemory, StepMemory | None] | TokenSeekError] = []

    def look(gm: fx.GraphModule, values: Sequence[Any]) -> None:
        try:
            refuse_split(gm)
            mode, examples = examples_of(values)
            if not trains(examples):
                raise GraphNotSupported("Nothing requires grad.", "Leave some parameters trainable.")
            with tracing(TracingContext(mode)):
                found.append(_steps(gm, examples, within_budget(gm, values, config), plain, set_to_none))
        except TokenSeekError as error:
            found.append(error)

    with planned_for(device):
        first_graph(model, (), inputs, look)
    if not found:
        raise GraphNotSupported("Dynamo found no graph to compile in the model.")
    if isinstance(found[0], TokenSeekError):
        raise found[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    largest = max((_bytes(p) for p in trained), default=0)
    return Estimate(
        parameters=sum(map(_bytes, [*model.parameters(), *model.buffers()])),
        gradients=sum(map(_bytes, trained)),
        optimizer=int(sum(states(p) for p in trained)),
        update=temporaries * largest,
        inputs=sum(_bytes(x) for x in inputs.values() if isinstance(x, Tensor)),
        step=found[0][0],
        plain=found[0][1],
        set_to_none=set_to_none,
    )


def bytes_of(size: str | int) -> int:
    """The bytes of a memory size: a number, or text such as "24GiB" (2^30 each) or "24GB" (10^9 each).

    Raises:
        ConfigError: ``size`` is invalid.

    >>> bytes_of("1.5KiB")
    1536
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or isinstance(size, bool):
        raise ConfigError(f"{size!r} is not a memory size: expected bytes, or text such as '24GiB' or '24GB'.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def held(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> int:
    """Peak bytes of forward and backward of a graph of Dynamo."""
    mode, examples = examples_of(inputs)
    with tracing(TracingContext(mode)):
        step, _ = _steps(gm, examples, config, plain=False, set_to_none=True)
    return max(step.forward, step.backward)


def _steps(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, plain: bool, set_to_none: bool
) -> tuple[StepMemory, StepMemory | None]:
    plan = config.plan()
    pipeline = training(plan)
    program = pipeline.run(Program(gm, tuple(inputs)), until=ANALYSED)

    def unchanged() -> Any:
        return inner_compiler(config)(gm, inputs)

    def rewritten() -> Any:
        known = rewrite(program, plan)
        return Rewritten(compile_segments(known, config), known, None)

    step = step_memory(unchanged if plan.keeps_all(program) else rewritten, inputs, set_to_none)
    return step, step_memory(unchanged, inputs, set_to_none) if plain else None


def _checked(config: Config) -> Config:
    if config.inner != "inductor":
        raise ConfigError(
            f"inner={config.inner!r}: the estimate reads the code that Inductor generates; it needs inner='inductor'."
        )
    return config


def _optimizer(optimizer: str | float | None) -> tuple[Any, int]:
    """A function from a parameter to its bytes of state, and the number of temporaries of an update."""
    if isinstance(optimizer, str):
        if optimizer not in _STATES:
            raise ConfigError(
                f"optimizer={optimizer!r}: expected {', '.join(map(repr, _STATES))}, or bytes per parameter."
            )
        return lambda p: _STATES[optimizer] * _bytes(p), _TEMPORARIES[optimizer]
    each = optimizer or 0
    if isinstance(each, bool) or not isinstance(each, (int, float)) or not each >= 0:
        raise ConfigError(f"optimizer={optimizer!r}: expected a name, bytes per parameter, or None.")
    return lambda p: each * p.numel(), 0


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def traceable(model: torch.nn.Module, dtype: torch.dtype | None) -> tuple[torch.nn.Module, FakeTensorMode | None]:
    """The model, or a copy with fake tensors on the CPU if it is on the meta device, fake or to be converted."""
    values = [*model.parameters(), *model.buffers()]
    if dtype is None and not any(map(_has_no_data, values)):
        return model, None
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return copy.deepcopy(model, {id(x): _faked(x, mode, dtype) for x in values}), mode


def _has_no_data(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _faked(x: Tensor, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Tensor:
    device = "cpu" if x.is_meta else x.device
    with mode:
        kind = dtype if dtype and x.is_floating_point() else x.dtype
        fake = torch.empty_strided(x.shape, x.stride(), dtype=kind, device=device)
    return torch.nn.Parameter(fake, x.requires_grad) if isinstance(x, torch.nn.Parameter) else fake


def examples_of(values: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Inputs of a graph as fake tensors with static sizes, also where Dynamo has symbols, and their new mode."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode, [_example(x, mode) for x in values]


def _example(x: Any, mode: FakeTensorMode) -> Any:
    if isinstance(x, torch.SymInt):
        return hint(x)
    if not isinstance(x, Tensor):
        return x
    with mode:
        fake = torch.empty_strided(*_hints(x.shape, x.stride()), dtype=x.dtype, device=x.device)
    if type(x) is Tensor and not x.ndim and x.dtype is torch.float64:
        fake.constant = x  # a float that Dynamo made an input, as it differed between models of this class
    return (
        torch.nn.Parameter(fake, x.requires_grad)
        if isinstance(x, torch.nn.Parameter)
        else fake.requires_grad_(x.requires_grad)
    )


def _hints(*sizes: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(map(hint, each)) for each in sizes]


def _inputs(model: torch.nn.Module, batch: int | Mapping[str, Any], seq: int | None) -> dict[str, Any]:
    """Example inputs by name."""
    if isinstance(batch, Mapping):
        if seq is not None:
            raise ConfigError(f"seq={seq!r}: example inputs have a length already; pass one of them.")
        return dict(batch)
    for name, value in {"batch": batch, "seq": seq}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{name}={value!r}: expected an integer of at least 1, or example inputs by name as batch."
            )
    if missing := {"input_ids", "labels"} - set(inspect.signature(model.forward).parameters):
        raise ConfigError(
            f"The forward of {type(model).__name__} takes no {' and no '.join(sorted(missing))}: "
            "pass example inputs by name as batch."
        )
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    ids = torch.zeros((batch, seq), dtype=torch.long, device=device)
    return {"input_ids": ids, "labels": ids.clone()}


def on_device(inputs: Mapping[str, Any], mode: FakeTensorMode | None) -> dict[str, Any]:
    """The inputs; with a ``mode`` as fake tensors on the device of ``traceable``'s model."""
    if mode is None:
        return dict(inputs)
    return {name: _faked(x, mode) if isinstance(x, Tensor) else x for name, x in inputs.items()}
