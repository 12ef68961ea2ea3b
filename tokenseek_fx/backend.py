"""The backend: ``torch.compile(model, backend="tokenseek", options={...})``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from . import compat, recording
from .config import Config
from .given import Given, given
from .passes.activity import FindActivity
from .passes.audit import partitioning
from .passes.blocks import FindBlocks
from .passes.canonicalize import Canonicalize
from .passes.ditch import Ditch
from .passes.errors import GraphNotSupported, NoAttention, NothingToSelect, TokenSeekError
from .passes.factors import same_size
from .passes.fake import fake_inputs
from .passes.geometry import device_of, example_sizes, runtime_sizes
from .passes.parallel import parallel_dims
from .passes.pipeline import Pipeline, analysis
from .passes.program import Program, source_line
from .passes.rules.op import hint, is_tensor
from .passes.seek import Signals
from .passes.select import Scorer, Select, kept_tokens, method_of, needs_of
from .passes.shift import UnshiftLabels
from .passes.streams import weighted_losses
from .passes.tail import has_token_loss
from .passes.token_axes import FindTokenAxes, Place, place_in
from .scorers import scorer_named
from .variants import Variants
from .warnings import TokenSeekWarning

Compiled = Callable[..., Any]
Passed = tuple[tuple[int, Place], ...]
#: Without a backward to save it for, Inductor inlines the residual stream into its readers layer after layer: other
#: kernels for every layer to compile, and the outputs of several layers alive at once (docs/design/0001).
_REWRITTEN = {"realize_reads_threshold": 1}

_GIVE = "give every part the same rows: `with tokenseek_fx.selecting(indices): ...`"
_SPLIT = f'Find the cause with torch.compile(model, backend="tokenseek", fullgraph=True), or {_GIVE}.'

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
    """Compile one graph of Dynamo: as it is where nothing is trained, else to train on rows of its own choice, or on those given.

    Raises:
        GraphNotSupported: the graph can't be rewritten exactly and ``config.strict``.
    """
    if not trains(inputs):
        return inner_compiler(config)(gm, inputs)
    if limit := compat.reaches_recompile_limit():
        _warn_of_limit(limit)
    return Trained(gm, inputs, config)


class Trained:
    """A compiled training graph: for rows of its own choice, or (under ``selecting``) for given ones, each when it is needed."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> None:
        self.gm, self.config, self.examples = gm, config, fake_inputs(gm, inputs)
        self.continued, self.split = _is_continued(inputs), split_at(gm)
        #: other graphs, or plain Python, may compute something of the model before or after this one
        self.part = self.split is not None or any(map(_is_activation, inputs))
        self.own = self._compile_own(inputs) if given() is None else Variants(self.examples, self._compile_own)
        self.with_rows: dict[Any, Variants] = {}
        self.attends = True

    def __call__(self, *args: Any) -> Any:
        rows = given()
        if rows is None:
            return self.own(*args)
        passed = () if self.attends else rows.passed(args)
        try:
            return self._variants(len(rows.tensors), passed)(*args, *rows.tensors)
        except NoAttention:  # only what other parts passed tells the tokens
            self.attends = False
            return self(*args)

    def _variants(self, count: int, passed: Passed) -> Variants:
        if (count, passed) not in self.with_rows:
            compile = partial(self._compile_with_rows, count=count, passed=passed)
            self.with_rows[count, passed] = Variants(self.examples, compile)
        return self.with_rows[count, passed]

    def _compile_own(self, inputs: Sequence[Any]) -> Compiled:
        if self.continued:
            return inner_compiler(self.config)(self.gm, inputs)
        return _compile_own(self.gm, inputs, self.config, self.split)

    def _compile_with_rows(self, inputs: Sequence[Any], count: int, passed: Passed) -> Compiled:
        """The graph for given rows, the last ``count`` inputs; as it is where that is right for any rows.

        Raises:
            GraphNotSupported: the graph can't be rewritten exactly.
        """
        inputs, rows = tuple(inputs[:-count]), tuple(inputs[-count:])
        known = Pipeline((Canonicalize(), UnshiftLabels(), FindActivity())).run(Program(self.gm, inputs))
        try:
            program = Pipeline((FindTokenAxes(passed), FindBlocks())).run(known)
        except NothingToSelect:
            return AsItIs(inner_compiler(self.config)(self.gm, inputs), known, parallel=False)
        except NoAttention:
            if self.attends:
                raise
            if known.activity.losses:
                raise _unknown_tokens("a loss") from None
            return AsItIs(inner_compiler(self.config)(self.gm, inputs), known)
        _check_rows(program, tuple(map(hint, example_sizes(program))))
        program = Pipeline((ditch(self.config, program, rows, self.part),)).run(program)
        return WithRows(_compiled(program, self.config), program, self.part)


def _compile_own(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, split: GraphNotSupported | None
) -> Compiled:
    """The graph for rows of its own choice, or as it is where it can't be rewritten."""
    compile_inner = inner_compiler(config)
    try:
        if split is not None:
            raise split
        program = analysis().run(Program(gm, tuple(inputs)))
        _refuse_part(program, inputs)
        if not keeps_all(program, config):
            program = Pipeline((ditch(config, program),)).run(program)
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
    return Rewritten(_compiled(program, config), program, config.seed)


def _unknown_tokens(what: str) -> GraphNotSupported:
    return GraphNotSupported(
        f"A part of the model has {what}, but neither an attention nor an input from a part that has one, so its tokens are not known.",
        "Compile it together with the last attention, or leave it uncompiled and compute the loss of the given rows.",
    )


def _compiled(program: Program, config: Config) -> Compiled:
    assert program.rewrite is not None
    with partitioning():
        return inner_compiler(config, _REWRITTEN)(program.rewrite.module, program.rewrite.inputs)


def ditch(config: Config, program: Program, given: tuple[Any, ...] = (), part: bool = False) -> Ditch:
    """The rewrite of a program that a config asks for; ``given`` and ``part`` as in ``Ditch``.

    Raises:
        GraphNotSupported: the scorer needs a loss, the graph has none, and ``config.strict``.
    """
    scorer = config.scoring if given else _scorer(config, program)
    return Ditch(
        select=Select(
            scorer=scorer,
            keep_ratio=config.keep_ratio,
            keep_tokens=config.keep_tokens,
            method=config.select or (method_of(scorer) if weighted_losses(program) else "topk"),
            mix=config.mix,
            weight_clip=config.weight_clip,
            labelled_first=config.labelled_first,
            keep_label=config.keep_label,
        ),
        signals=Signals(_layers(config), config.gradient_of, tuple(config.pinned)),
        logits=config.logits,
        report_loss=config.report_loss,
        kv_grad=config.kv_grad,
        given=given,
        part=part,
    )


def _scorer(config: Config, program: Program) -> Scorer:
    """The scorer, or what takes its place where tokens have no loss: their gradient, or attention where there is no loss."""
    scorer = config.scoring
    wanted = sorted(needs_of(scorer) & {"gradient", "loss"})
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
        self.compiled, self.noise, self.names = compiled, noise_for(program, seed), program.rewrite.names
        self.instances = fingerprints(program)

    def __call__(self, *args: Any) -> Sequence[Any]:
        outputs = self.compiled(*args, *self.noise(args))
        count = len(outputs) - len(self.names)
        if recording.is_open():
            recording.note(**dict(zip(self.names, outputs[count:], strict=True)), **self.instances(args))
        return outputs[:count]


class WithRows:
    """The compiled graph rewritten for given rows, called with the inputs of Dynamo's graph and the rows."""

    def __init__(self, compiled: Compiled, program: Program, part: bool) -> None:
        self.compiled, self.program, self.part = compiled, program, part
        self.shape, self.instances = runtime_sizes(program), fingerprints(program)
        self.weighs = bool(weighted_losses(program))
        axes = program.axes
        self.inputs = [place_in(axes, node) if is_tensor(node) else None for node in program.placeholders]
        self.outputs = [place_in(axes, x) if isinstance(x, fx.Node) and is_tensor(x) else None for x in program.outputs]

    def __call__(self, *args: Any) -> Sequence[Any]:
        inputs = args[: len(self.inputs)]
        batch, tokens = self.shape(inputs)
        rows = _check_rows(self.program, (batch, tokens))
        self._check_passed(rows, inputs)
        rows.used, rows.weighed = True, rows.weighed or self.weighs
        if recording.is_open() and not self.part:
            scores = torch.zeros(batch, tokens, device=rows.indices.device).scatter(1, rows.indices, 1.0)
            recording.note(**rows.named, scores=scores, **self.instances(inputs))
        outputs = self.compiled(*args)
        rows.places.update((x, place) for x, place in zip(outputs, self.outputs, strict=False) if place is not None)
        return outputs

    def _check_passed(self, rows: Given, inputs: Sequence[Any]) -> None:
        """Other parts agree on the token axis; one without attention works by rows along it."""
        for x, place in zip(inputs, self.inputs, strict=True):
            if isinstance(x, torch.Tensor) and rows.places.get(x, place) != place:
                raise GraphNotSupported("The token axis of a part of the model is not the one of the parts before it.")
            if isinstance(x, torch.Tensor) and x in rows.parallel and (not place or place[1] not in rows.parallel[x]):
                raise GraphNotSupported(
                    "A part of the model before its first attention mixes tokens, or does so for all that is known.",
                    "Compile it together with the first attention.",
                )


def _check_rows(program: Program, sizes: tuple[int, int]) -> Given:
    """The given rows, which fit a batch of these sizes."""
    rows = given()
    assert rows is not None and program.activity is not None
    rows.check_fits(*sizes, program.activity.trainable[0].meta["val"].device)
    return rows


class AsItIs:
    """A graph that is right as it is for any rows: along the token axis, whichever it is, it works by rows."""

    def __init__(self, compiled: Compiled, program: Program, parallel: bool = True) -> None:
        self.compiled, self.inputs = compiled, len(program.inputs)
        self.parallel = parallel_dims(program) if parallel else {}

    def __call__(self, *args: Any) -> Any:
        rows = given()
        assert rows is not None
        rows.used, inputs = True, args[: self.inputs]
        before = {i: rows.parallel.get(x, frozenset()) for i, x in enumerate(inputs) if _is_activation(x)}
        if self.parallel and not all(before.values()):
            raise _unknown_tokens("an input with gradient")
        outputs = self.compiled(*inputs)
        for position, dims in self.parallel.items():
            right = (dim for dim, at in dims.items() if all(at.get(i) in known for i, known in before.items()))
            rows.parallel[outputs[position]] = frozenset(right)
        return outputs


class KeepAll:
    """The plain graph where every token is kept: the rewrite would only repeat it."""

    def __init__(self, compiled: Compiled, program: Program) -> None:
        self.compiled, self.shape, self.device = compiled, runtime_sizes(program), device_of(program)
        self.instances = fingerprints(program)

    def __call__(self, *args: Any) -> Any:
        if recording.is_open():
            recording.note(**self.selection(args))
        return self.compiled(*args)

    def selection(self, args: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Every token, by the fields of ``Selection``."""
        batch, tokens = self.shape(args)
        everything = torch.arange(tokens, device=self.device).repeat(batch, 1)
        return {
            "indices": everything,
            "scores": torch.ones_like(everything, dtype=torch.float32),
            **self.instances(args),
        }


def fingerprints(program: Program) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
    """What names the sequences of a call by their token ids: ``{"instances": [B] int64}``, or nothing without ids."""
    axes = program.axes
    layout = (axes.batch, axes.token)
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


def noise_for(program: Program, seed: int | None) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
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
    return any(map(_is_activation, inputs)) and compat.continues_a_split_model()


def _refuse_part(program: Program, inputs: Sequence[Any]) -> None:
    """Raise ``GraphNotSupported`` for a block that is compiled for itself: other blocks would choose other rows."""
    if not program.activity.losses and any(map(_is_activation, inputs)):
        raise GraphNotSupported(
            "The graph gets an activation that requires grad and has no loss: it is a part of a model, whose parts would choose "
            "different rows.",
            f"Compile the whole model, or {_GIVE}, for instance those of tokenseek_fx.seek(model, **batch).",
        )


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf


def split_at(gm: fx.GraphModule) -> GraphNotSupported | None:
    """What is wrong with a part of a model that Dynamo splits; to be asked while Dynamo compiles it."""
    if outer := compat.module_outside():
        return GraphNotSupported(
            f"Dynamo runs the forward of {type(outer).__name__} as plain Python, and a part of a model can't be rewritten.",
            _SPLIT,
        )
    if found := compat.graph_break(gm):
        reason, file, line = found
        return GraphNotSupported(
            f"Dynamo split the model at {file}:{line} ({reason}), and a part of a model can't be rewritten.",
            _SPLIT,
        )
    return None


def refuse_split(gm: fx.GraphModule) -> None:
    """Raise ``GraphNotSupported`` for a part of a model that Dynamo splits."""
    if (error := split_at(gm)) is not None:
        raise error


def keeps_all(program: Program, config: Config) -> bool:
    _, tokens = example_sizes(program)
    return config.logits == "keep" and same_size(kept_tokens(tokens, config.keep_ratio, config.keep_tokens), tokens)


def _warn(gm: fx.GraphModule, error: Exception) -> None:
    reason = str(error) if isinstance(error, TokenSeekError) else f"internal error, {type(error).__name__}: {error}"
    place = next((place for node in gm.graph.nodes if (place := source_line(node))), "")
    warnings.warn(f"tokenseek: {reason} Compiled without token selection {place}.", TokenSeekWarning, stacklevel=2)


def _warn_of_limit(limit: int) -> None:
    warnings.warn(
        f"tokenseek: Dynamo compiled this forward {limit} times, its recompile limit: what no compiled graph fits will run as plain "
        "PyTorch, without token selection. Compile with dynamic=True, pad to fewer lengths, or raise "
        "torch._dynamo.config.recompile_limit.",
        TokenSeekWarning,
        stacklevel=2,
    )
