"""Graphs compiled outside Dynamo: on the first call, and again for arguments that no compiled graph fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

Compiled = Callable[..., Any]


class Variants:
    """The compiled variants of a graph of Dynamo, possibly with tensors after its inputs that Dynamo doesn't know.

    ``compile`` compiles the graph for fake arguments. Dims that Dynamo made dynamic are dynamic here. Dims of the extra
    tensors are dynamic if any input has a dynamic dim; otherwise they become dynamic when they change. Each variant has
    the guards of its own trace and runs for arguments that satisfy them. ``static``: no dim is dynamic. ``floats``: the
    positions of tensors that the graph reads a float from, which is a constant of a variant.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        compile: Callable[[tuple[Any, ...]], Compiled],
        static: bool = False,
        floats: Sequence[int] = (),
    ) -> None:
        self.compile, self.known = compile, list[tuple[Callable[..., bool], Compiled]]()
        self.static, self.floats = static, floats
        self.dynamic = [_dynamic_dims(example) for example in examples]
        self.first: list[torch.Size] | None = None

    def __call__(self, *args: Any) -> Any:
        compiled = next((compiled for fits, compiled in self.known if fits(args)), None)
        return (compiled or self._add(args))(*args)

    def _add(self, args: tuple[Any, ...]) -> Compiled:
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        known = 0 if self.static else len(self.dynamic)
        dynamic = [*self.dynamic[:known], *self._changing(args[known:])]
        fakes = tuple(
            _constant(mode, x) if i in self.floats else _fake(mode, x, dims, f"input_{i}")
            for i, (x, dims) in enumerate(zip(args, dynamic, strict=True))
        )
        values = {i: args[i].item() for i in self.floats}
        with tracing(TracingContext(mode)):
            compiled = self.compile(fakes)
        fits = _guard(env, fakes, dynamic, args, known)
        has_values = lambda args: all(args[i].item() == value for i, value in values.items())  # noqa: E731
        self.known.append((lambda args: has_values(args) and fits(args), compiled))
        return compiled

    def _changing(self, extra: Sequence[Any]) -> list[tuple[bool, ...]]:
        if self.static:
            return [(False,) * len(_sizes(x)) for x in extra]
        if any(any(dims) for dims in self.dynamic):
            return [(True,) * x.ndim for x in extra]
        if self.first is None:
            self.first = [x.shape for x in extra]
        return [
            tuple(a != b for a, b in zip(x.shape, before, strict=True))
            for x, before in zip(extra, self.first, strict=True)
        ]


def _dynamic_dims(example: Any) -> tuple[bool, ...]:
    """For each dim of a tensor, or for a single number: whether it is dynamic."""
    return tuple(isinstance(size, torch.SymInt) for size in _sizes(example))


def _sizes(value: Any) -> Sequence[Any]:
    """The sizes of a tensor; a single number."""
    return value.shape if isinstance(value, Tensor) else (value,)


def _fake(mode: FakeTensorMode, x: Any, dynamic: tuple[bool, ...], name: str) -> Any:
    """``x`` as a fake in ``mode``. Equal dynamic sizes share a symbol, which guards check."""
    env, source = mode.shape_env, ConstantSource(name)
    assert env is not None
    if isinstance(x, Tensor):
        sizes = [DimDynamic.DUCK if changes else DimDynamic.STATIC for changes in dynamic]
        context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * x.ndim)
        return mode.from_tensor(x, static_shapes=False, symbolic_context=context, source=source)
    if any(dynamic):
        return env.create_symintnode(env.create_symbol(x, source, DimDynamic.DUCK), hint=x, source=source)
    return x


def _constant(mode: FakeTensorMode, x: Tensor) -> Tensor:
    """A tensor of one number as a fake in ``mode`` that knows it."""
    with mode:
        fake = torch.empty((), dtype=x.dtype)
    fake.constant = x.clone()  # type: ignore[attr-defined]
    return fake


def _guard(
    env: ShapeEnv, fakes: Sequence[Any], dynamic: Sequence[tuple[bool, ...]], args: Sequence[Any], known: int
) -> Callable[[Sequence[Any]], bool]:
    """A predicate: True for arguments that fit the trace of ``fakes``. Dynamo guards static sizes of its inputs."""
    places = [i for i, dims in enumerate(dynamic) if any(dims)]
    code = env.produce_guards_expression([fakes[i] for i in places]) if places else None
    static = {
        (i, dim): size
        for i in range(known, len(args))
        for dim, size in enumerate(_sizes(args[i]))
        if not dynamic[i][dim]
    }

    def fits(args: Sequence[Any]) -> bool:
        if any(_sizes(args[i])[dim] != size for (i, dim), size in static.items()):
            return False
        return code is None or bool(env.evaluate_guards_expression(code, [args[i] for i in places]))

    return fits


def floats_read(gm: fx.GraphModule) -> list[int]:
    """The positions of the inputs of Dynamo's graph that are floats: tensors of one number that the graph reads."""
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    return [i for i, node in inputs if any(user.target == "item" for user in node.users) and _is_float(node)]


def _is_float(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    return isinstance(example, Tensor) and not example.ndim and example.dtype is torch.float64 and example.is_cpu
