"""The backend: ``torch.compile(model, backend="tokenseek", options={...})``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from . import compat, recording
from .config import Config, ConfigError
from .outputs import without_gradient
from .passes.audit import partitioning
from .passes.ditch import Ditch
from .passes.errors import GraphNotSupported, NothingToSelect, TokenSeekError
from .passes.factors import same_size
from .passes.geometry import device_of, example_sizes, runtime_sizes
from .passes.pipeline import Pipeline, analysis
from .passes.program import Program, source_line
from .passes.rules.op import hint, is_tensor
from .passes.seek import Signals
from .passes.select import Scorer, Select, kept_tokens, method_of, needs_of
from .passes.streams import weighted_losses
from .passes.tail import has_token_loss
from .passes.token_axes import TokenAxis
from .scorers import scorer_named
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
    if not isinstance(config, Config | None):
        raise ConfigError(
            f"backend(...) is given a {type(config).__name__}: expected a Config. Options as a dict go to "
            'torch.compile(model, backend="tokenseek", options={...}).'
        )
    chosen = config or Config()
    return lambda gm, inputs: compile_graph(gm, inputs, chosen)


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Compiled:
    """Rewrite one graph of Dynamo and compile it; compile it as it is where nothing is to be selected.

    Raises:
        GraphNotSupported: the graph can't be rewritten exactly and ``config.strict``.
        ConfigError: an option has no effect, or the scorer fails.
    """
    _refuse_second_compile()
    compile_inner = inner_compiler(config)
    if not trains(inputs) or _is_continued(inputs):
        return compile_inner(gm, inputs)
    try:
        refuse_split(gm)
        program = analysis().run(Program(gm, tuple(inputs)))
        refuse_middle(program, inputs)
        if not _keeps_all(program, config):
            program = Pipeline((ditch(config, program),)).run(program)
    except NothingToSelect:
        return compile_inner(gm, inputs)
    except ConfigError:
        raise
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


def ditch(config: Config, program: Program) -> Ditch:
    """The rewrite of a program that a config asks for.

    Raises:
        GraphNotSupported: the options ask for what the graph doesn't have, and ``config.strict``.
    """
    _say_what_has_no_effect(config, program)
    signals = Signals(_layers(config), config.gradient_of, tuple(config.pinned))
    main, *others = (
        _select(config, i, _scorer(config, program, signals, axis), program)
        for i, axis in enumerate(program.axes.tokens)
    )
    return Ditch(
        select=main,
        others=tuple(others),
        signals=signals,
        logits=config.logits,
        report_loss=config.report_loss,
        kv_grad=config.kv_grad,
    )


def _select(config: Config, number: int, scorer: Scorer, program: Program) -> Select:
    """How the tokens of an axis are chosen. Those of a further axis have no loss to be weighted in: their scores are ranks."""
    weighted = number == 0 and weighted_losses(program)
    return Select(
        scorer=scorer,
        keep_ratio=config.ratio_of(number),
        keep_tokens=config.keep_tokens,
        method=(config.select if number == 0 else None) or (method_of(scorer) if weighted else "topk"),
        mix=config.mix,
        weight_clip=config.weight_clip,
        labelled_first=config.labelled_first,
        keep_label=config.keep_label,
    )


def _scorer(config: Config, program: Program, signals: Signals, axis: TokenAxis) -> Scorer:
    """The scorer, or what takes its place where tokens have no loss: their gradient, or attention where they have none either."""
    scorer = config.scoring
    wanted = sorted(needs_of(scorer) & {"gradient", "loss"})
    if axis != program.axes.main:
        there = "loss" not in wanted and signals.has_gradient(program, axis) if wanted else True
        return scorer if there else scorer_named("attention", {})
    if not program.activity.losses and wanted:
        fact = f"The graph has no loss, so the scorer has no {' and no '.join(wanted)} of tokens."
        if config.strict:
            raise GraphNotSupported(fact, 'Compute the loss inside the model, or choose scorer="attention".')
        return _instead(fact, "attention")
    if "loss" in wanted and not has_token_loss(program):
        return _instead("The loss is not one over tokens, so a token has no loss of its own.", "gradient")
    return scorer


def _instead(fact: str, name: str) -> Scorer:
    warnings.warn(f"tokenseek: {fact} Tokens are scored by {name} instead.", TokenSeekWarning, stacklevel=2)
    return scorer_named(name, {})


def _say_what_has_no_effect(config: Config, program: Program) -> None:
    """Tell of options that this graph has no use for, or raise where ``config.strict``."""
    for fact, remedy in _no_use(config, program):
        if config.strict:
            raise GraphNotSupported(fact, remedy)
        warnings.warn(f"tokenseek: {fact} {remedy}", TokenSeekWarning, stacklevel=2)


def _no_use(config: Config, program: Program) -> Iterator[tuple[str, str]]:
    """Facts and remedies: what the loss, the token axes and the length of the example leave no use for."""
    losses, axes = program.activity.losses, program.axes.tokens
    for name, given in {"logits": config.logits == "drop", "report_loss": config.report_loss is not None}.items():
        if given and not losses:
            option = f"{name}={getattr(config, name)!r}"
            yield f"The graph has no loss, so {option} has no effect.", "Compute the loss inside the model."
    if isinstance(config.keep_ratio, Sequence) and len(config.keep_ratio) > len(axes):
        yield f"keep_ratio={config.keep_ratio}: token axes of the model: {len(axes)}.", "Give one ratio for each."
    tokens = hint(example_sizes(program, axes[0])[1])
    there = {i % tokens for i in config.pinned if -tokens <= i < tokens}
    if missing := [i for i in config.pinned if not -tokens <= i < tokens]:
        fact = f"pinned={missing}: no such position, tokens of a sequence: {tokens}."
        yield fact, "Number them from 0, or from -1 at the end."
    kept = kept_tokens(tokens, config.ratio_of(0), config.keep_tokens)
    if len(there) > kept:
        yield f"pinned={list(config.pinned)}: not all are kept, kept tokens: {kept}.", "Keep more, or pin fewer."


def _layers(config: Config) -> str | tuple[int, ...]:
    return config.attention_layers if isinstance(config.attention_layers, str) else tuple(config.attention_layers)


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
        self.compiled, self.noise, self.names = compiled, _noise(program, seed), program.rewrite.names
        self.instances, self.marked = fingerprints(program), without_gradient(program)

    def __call__(self, *args: Any) -> Sequence[Any]:
        outputs = self.compiled(*args, *self.noise(args))
        count = len(outputs) - sum(map(len, self.names))
        if recording.is_open():
            told = iter(outputs[count:])
            first, *others = ({name: next(told) for name in names} for names in self.names)
            recording.note({**first, **self.instances(args)}, *others)
        return self.marked(outputs[:count])


class KeepAll:
    """The plain graph where every token is kept: the rewrite would only repeat it."""

    def __init__(self, compiled: Compiled, program: Program) -> None:
        self.compiled, self.device = compiled, device_of(program)
        self.shapes = [runtime_sizes(program, axis) for axis in program.axes.tokens]
        self.instances = fingerprints(program)

    def __call__(self, *args: Any) -> Any:
        if recording.is_open():
            first, *others = (self._everything(*shape(args)) for shape in self.shapes)
            recording.note({**first, **self.instances(args)}, *others)
        return self.compiled(*args)

    def _everything(self, batch: int, tokens: int) -> dict[str, torch.Tensor]:
        everything = torch.arange(tokens, device=self.device).repeat(batch, 1)
        return {"indices": everything, "scores": torch.ones_like(everything, dtype=torch.float32)}


def fingerprints(program: Program) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
    """What names the sequences of a call by their token ids: ``{"instances": [B] int64}``, or nothing without ids."""
    axes = program.axes
    layout = (axes.main.batch, axes.main.token)
    places = [i for i, node in enumerate(program.placeholders) if is_tensor(node) and axes.of(node) == layout]
    ids = [i for i in places if not program.inputs[i].is_floating_point()]
    if not ids:
        return lambda args: {}
    return lambda args: {"instances": torch.stack([_hashed(args[i].long(), i) for i in ids]).sum(0)}


def _hashed(ids: torch.Tensor, salt: int) -> torch.Tensor:
    """One number per row of [B, T]; integer arithmetic wraps around."""
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    mixed = (ids + 1 + salt) * 0x9E3779B97F4A7C1 + place * 0x1F83D9ABFB41BD6
    return ((mixed ^ (mixed >> 29)) * 0x3C6EF372FE94F82).sum(-1)


def _noise(program: Program, seed: int | None) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
    """What draws the noise of the scorers, uniform float32 [B, T] for each, for a call with given arguments."""
    assert program.rewrite is not None
    shapes = [runtime_sizes(program, program.axes.tokens[i]) for i in program.rewrite.noisy]
    device = device_of(program)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return lambda args: tuple(torch.rand(shape(args), device=device, generator=generator) for shape in shapes)


def trains(inputs: Sequence[Any]) -> bool:
    """True when a graph is compiled for training: gradients are on and some input requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _is_continued(inputs: Sequence[Any]) -> bool:
    """True for the rest of a model that Dynamo split, which was reported with its first part."""
    return any(_is_activation(x) for x in inputs) and compat.continues_a_split_model()


def refuse_split(gm: fx.GraphModule) -> None:
    """Raise ``GraphNotSupported`` for a part of a model that Dynamo splits."""
    if outer := compat.module_outside():
        raise GraphNotSupported(
            f"Dynamo runs the forward of {type(outer).__name__} as plain Python, and a part of a model can't be rewritten.",
            'Find the cause with torch.compile(model, backend="tokenseek", fullgraph=True).',
        )
    if found := compat.graph_break(gm):
        reason, file, line = found
        raise GraphNotSupported(
            f"Dynamo split the model at {file}:{line} ({reason}), and a part of a model can't be rewritten.",
            'Find the cause with torch.compile(model, backend="tokenseek", fullgraph=True).',
        )


def refuse_middle(program: Program, inputs: Sequence[Any]) -> None:
    """Raise ``GraphNotSupported`` for a compiled part of a model: a block between others would choose tokens of its own."""
    if not program.activity.losses and any(_is_activation(x) for x in inputs):
        raise GraphNotSupported(
            "The compiled module is a part of a model: what it gets carries gradient and it returns no loss, so it would "
            "cut the gradient of the others at tokens of its own choice.",
            "Compile the whole model.",
        )


def _refuse_second_compile() -> None:
    if compat.compiled_twice():
        raise ConfigError(
            "The model is compiled twice: model.compile(...) compiles it, and torch.compile(model, ...) around it has no "
            "effect. Use one of them; calling model.compile(...) again replaces its options."
        )


def _is_activation(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf


def _keeps_all(program: Program, config: Config) -> bool:
    lengths = [example_sizes(program, axis)[1] for axis in program.axes.tokens]
    kept = [kept_tokens(tokens, config.ratio_of(i), config.keep_tokens) for i, tokens in enumerate(lengths)]
    return config.logits == "keep" and all(map(same_size, kept, lengths))


def _warn(gm: fx.GraphModule, error: Exception) -> None:
    notes = getattr(error, "__notes__", ())
    internal = " ".join((f"internal error, {type(error).__name__}: {error}", *notes))
    reason = str(error) if isinstance(error, TokenSeekError) else internal
    place = next((place for node in gm.graph.nodes if (place := source_line(node))), "")
    here = f"Compiled without token selection {place}".strip()
    warnings.warn(f"tokenseek: {reason} {here}.", TokenSeekWarning, stacklevel=2)
