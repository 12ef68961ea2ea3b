"""The backend: ``torch.compile(model, backend="tokenseek", options={...})``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from . import compat, recording
from .config import Config
from .passes.audit import partitioning
from .passes.ditch import Ditch
from .passes.errors import GraphNotSupported, NothingToSelect, TokenSeekError
from .passes.factors import same_size
from .passes.geometry import device_of, example_sizes, runtime_sizes
from .passes.pipeline import Pipeline, analysis
from .passes.program import Program, source_line
from .passes.select import TopK, kept_tokens
from .scorers import needs_noise
from .warnings import TokenSeekWarning

Compiled = Callable[..., Any]
#: Without a backward to save it for, Inductor inlines the residual stream into its readers layer after layer: other
#: kernels for every layer to compile, and the outputs of several layers alive at once (docs/design/0001).
_REWRITTEN = {"realize_reads_threshold": 1}

compat.ignore_logging_in_forward()


def tokenseek(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """The Dynamo backend registered as ``"tokenseek"``. ``options``: the fields of ``Config``."""
    return compile_graph(gm, inputs, Config.from_options(options, mode))


def backend(config: Config | None = None) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """The backend as a callable, for ``torch.compile(model, backend=tokenseek_fx.backend(Config(...)))``."""
    chosen = config or Config()
    return lambda gm, inputs: compile_graph(gm, inputs, chosen)


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Compiled:
    """Rewrite one graph of Dynamo and compile it; compile it as it is where nothing is to be selected.

    Raises:
        GraphNotSupported: the graph can't be rewritten exactly and ``config.strict``.
    """
    compile_inner = inner_compiler(config)
    if not trains(inputs) or _is_continued(inputs):
        return compile_inner(gm, inputs)
    try:
        refuse_split(gm)
        program = analysis().run(Program(gm, tuple(inputs)))
        if not _keeps_all(program, config):
            program = Pipeline((ditch(config),)).run(program)
    except NothingToSelect:
        return compile_inner(gm, inputs)
    except Exception as error:
        if config.strict:
            raise
        _warn(gm, error)
        return compile_inner(gm, inputs)
    rewrite = program.rewrite
    if rewrite is None:
        return KeepAll(compile_inner(gm, inputs), program)
    with partitioning():
        compiled = inner_compiler(config, _REWRITTEN)(rewrite.module, rewrite.inputs)
    return Rewritten(compiled, program, config.seed)


def ditch(config: Config) -> Ditch:
    """The rewrite that a config asks for."""
    select = TopK(config.scoring, config.keep_ratio, config.keep_tokens)
    return Ditch(select, config.logits, needs_noise(config.scoring))


def inner_compiler(
    config: Config, defaults: Mapping[str, Any] | None = None
) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """What compiles a graph to code; ``defaults`` are Inductor options that the user's go before."""
    if config.inner == "inductor":
        return compat.inductor(config.mode, {**(defaults or {}), **(config.inductor_options or {})})
    return lookup_backend(config.inner)  # type: ignore[return-value]


class Rewritten:
    """The compiled rewritten graph, called with the inputs of Dynamo's graph."""

    def __init__(self, compiled: Compiled, program: Program, seed: int | None) -> None:
        self.compiled, self.noise = compiled, _noise(program, seed)

    def __call__(self, *args: Any) -> list[Any]:
        *outputs, scores, indices = self.compiled(*args, *self.noise(args))
        recording.note(indices, scores)
        return outputs


class KeepAll:
    """The plain graph where every token is kept: the rewrite would only repeat it."""

    def __init__(self, compiled: Compiled, program: Program) -> None:
        self.compiled, self.shape, self.device = compiled, runtime_sizes(program), device_of(program)

    def __call__(self, *args: Any) -> Any:
        if recording.is_open():
            batch, tokens = self.shape(args)
            everything = torch.arange(tokens, device=self.device).repeat(batch, 1)
            recording.note(everything, torch.ones_like(everything, dtype=torch.float32))
        return self.compiled(*args)


def _noise(program: Program, seed: int | None) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
    """What draws the scorer's noise, uniform float32 [B, T], for a call with given arguments."""
    assert program.rewrite is not None
    if len(program.rewrite.inputs) == len(program.inputs):
        return lambda args: ()
    shape, device = runtime_sizes(program), device_of(program)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return lambda args: (torch.rand(shape(args), device=device, generator=generator),)


def trains(inputs: Sequence[Any]) -> bool:
    """True when a graph is compiled for training: gradients are on and some input requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _is_continued(inputs: Sequence[Any]) -> bool:
    """True for the rest of a model that Dynamo split, which was reported with its first part."""
    activations = any(isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf for x in inputs)
    return activations and compat.continues_a_split_model()


def refuse_split(gm: fx.GraphModule) -> None:
    """Raise ``GraphNotSupported`` for the first part of a model that Dynamo splits."""
    if found := compat.graph_break(gm):
        reason, file, line = found
        raise GraphNotSupported(
            f"Dynamo split the model at {file}:{line} ({reason}), and a part of a model can't be rewritten.",
            'Find the cause with torch.compile(model, backend="tokenseek", fullgraph=True).',
        )


def _keeps_all(program: Program, config: Config) -> bool:
    _, tokens = example_sizes(program)
    return config.logits == "keep" and same_size(kept_tokens(tokens, config.keep_ratio, config.keep_tokens), tokens)


def _warn(gm: fx.GraphModule, error: Exception) -> None:
    reason = str(error) if isinstance(error, TokenSeekError) else f"internal error, {type(error).__name__}: {error}"
    place = next((place for node in gm.graph.nodes if (place := source_line(node))), "")
    warnings.warn(f"tokenseek: {reason} Compiled without token selection {place}.", TokenSeekWarning, stacklevel=2)
