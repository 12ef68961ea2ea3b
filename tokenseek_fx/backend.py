"""The backend: ``torch.compile(model, backend="tokenseek", options={...})``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from . import compat
from .compiled import AsItIs, Compiled, KeepAll, Rewritten, WithRows, check_rows, is_activation, unknown_tokens
from .config import Config, ConfigError, bytes_in
from .given import given
from .passes.activity import FindActivity
from .passes.attend import FindAttending
from .passes.audit import computed_again
from .passes.blocks import FindBlocks
from .passes.canonicalize import Canonicalize
from .passes.chunks import Chunk, room_for_rows
from .passes.ditch import Ditch
from .passes.errors import GraphNotSupported, NoAttention, NothingToSelect, TokenSeekError
from .passes.factors import same_size
from .passes.fake import fake_inputs
from .passes.geometry import example_sizes
from .passes.pipeline import Pipeline, analysis
from .passes.program import Program, source_line
from .passes.remake import find_remade
from .passes.rules.op import hint
from .passes.saving import partition_of, partitioning
from .passes.seek import Signals
from .passes.select import Scorer, Select, kept_tokens, method_of, needs_of
from .passes.shift import UnshiftLabels
from .passes.split import Segments, Split
from .passes.streams import weighted_losses
from .passes.tail import has_token_loss
from .passes.token_axes import FindTokenAxes, Place, TokenAxis
from .planner import within_budget
from .scorers import scorer_named
from .variants import Variants
from .warnings import TokenSeekWarning

Passed = tuple[tuple[int, Place], ...]
#: Without a backward to save it for, Inductor inlines the residual stream into its readers layer after layer: other
#: kernels for every layer to compile, and the outputs of several layers alive at once (docs/design/0001).
_REWRITTEN = {"realize_reads_threshold": 1}

_CONVERTS_FP8 = (8, 9)

_GIVE = "give every part the same rows: `with tokenseek_fx.selecting(indices): ...`"
_SPLIT = f'Find the cause with torch.compile(model, backend="tokenseek", fullgraph=True), or {_GIVE}.'
_SHARDED = (
    f"FSDP2 gathers every sharded block by hooks. Shard the model as one unit, by fully_shard(model) alone, or {_GIVE}."
)

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
    """Compile one graph of Dynamo: as it is where nothing is trained, else to train on rows of its own choice, or on those given.

    Raises:
        GraphNotSupported: the graph can't be rewritten exactly and ``config.strict``.
        ConfigError: an option has no effect, or the scorer fails.
    """
    _refuse_second_compile()
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
        self.part = self.split is not None or any(map(is_activation, inputs))
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
            program = Pipeline((FindTokenAxes(passed), FindBlocks(), FindAttending())).run(known)
        except NothingToSelect:
            return AsItIs(inner_compiler(self.config)(self.gm, inputs), known, parallel=False)
        except NoAttention:
            if self.attends:
                raise
            if known.activity.losses:
                raise unknown_tokens("a loss") from None
            return AsItIs(inner_compiler(self.config)(self.gm, inputs), known)
        check_rows(program, tuple(map(hint, example_sizes(program, program.axes.main))))
        program = Pipeline((ditch(self.config, program, rows, self.part),)).run(program)
        return WithRows(compile_rewritten(program, self.config), program, self.part)


def _compile_own(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, split: GraphNotSupported | None
) -> Compiled:
    """The graph for rows of its own choice, or as it is where it can't be rewritten."""
    compile_inner = inner_compiler(config)
    try:
        if split is not None:
            raise split
        program = analysis().run(Program(gm, tuple(inputs)))
        refuse_part(program, inputs)
        if not keeps_all(program, config):
            config = within_budget(gm, inputs, config)
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
    return Rewritten(compile_rewritten(program, config), program, config.seed)


def compile_rewritten(program: Program, config: Config) -> Segments:
    """The rewritten graph of a program, in chunks and segments."""
    chunk_bytes = bytes_in(config.chunk_bytes)
    room = room_for_rows(program, chunk_bytes)
    segments = Pipeline((Chunk(chunk_bytes), Split())).run(program).segments
    assert segments is not None
    again = computed_again(segments, config.saving, config.kv, room)
    segments = replace(segments, again=again / len(segments.parts))
    return segments.compiled(lambda number, part, taken: _compiled_part(part, taken, config, number < again))


def _compiled_part(part: fx.GraphModule, inputs: Sequence[Any], config: Config, again: bool) -> Compiled:
    """A segment; ``again``: its forward is computed again in backward."""
    partition = partition_of(part, inputs, again, config.kv)
    if config.inner == "aot_eager":
        return compat.aot_eager(partition)(part, inputs)
    with partitioning(partition):
        return inner_compiler(config, _REWRITTEN)(part, inputs)


def ditch(config: Config, program: Program, given: tuple[Any, ...] = (), part: bool = False) -> Ditch:
    """The rewrite of a program that a config asks for; ``given`` and ``part`` as in ``Ditch``.

    Raises:
        GraphNotSupported: the options ask for what the graph doesn't have, and ``config.strict``.
        ConfigError: the device can't keep keys and values as ``config.kv`` says.
    """
    check_kv(config, next(x.device for x in program.inputs if isinstance(x, torch.Tensor)))
    _say_what_has_no_effect(config, [*_keeps_kv(config, program), *(() if given else _no_use(config, program))])
    signals = Signals(_layers(config), config.gradient_of, tuple(config.pinned))
    main, *others = (
        _select(config, i, config.scoring if given else _scorer(config, program, signals, axis), program)
        for i, axis in enumerate(program.axes.tokens)
    )
    return Ditch(
        select=main,
        others=tuple(others),
        signals=signals,
        logits=config.logits,
        report_loss=config.report_loss,
        kv_grad=config.kv_grad,
        remake=config.kv == "recompute",
        given=given,
        part=part,
    )


def check_kv(config: Config, device: torch.device) -> None:
    """Raise ``ConfigError`` where keys and values of this device can't be kept as ``config.kv`` says."""
    if config.kv == "offload" and device.type == "cpu":
        raise ConfigError(
            "kv='offload' has no effect: the model is on the CPU, and so are keys and values. Use kv='keep'."
        )
    if config.kv == "fp8" and device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if config.inner == "inductor" and capability < _CONVERTS_FP8:
            has = ".".join(map(str, capability))
            raise ConfigError(
                f"kv='fp8': Triton converts float8_e4m3fn from compute capability 8.9 on, this GPU has {has}. Use kv='offload'."
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


def _say_what_has_no_effect(config: Config, facts: Iterable[tuple[str, str]]) -> None:
    """Tell facts and remedies of options that this graph has no use for, or raise where ``config.strict``."""
    for fact, remedy in facts:
        if config.strict:
            raise GraphNotSupported(fact, remedy)
        warnings.warn(f"tokenseek: {fact} {remedy}", TokenSeekWarning, stacklevel=2)


def _keeps_kv(config: Config, program: Program) -> Iterator[tuple[str, str]]:
    """A fact and a remedy: what looks at no keys and values by position has none that could be kept otherwise; nor has a model where
    nothing smaller makes them."""
    live = [a.out for a in program.axes.attentions if a.out in program.activity.live]
    count = sum(node not in program.attending for node in live)
    if config.kv == "recompute" and count < len(live):
        if not find_remade(program).attentions:
            fact = f"kv='recompute' has no effect: nothing smaller makes the keys and values (attentions: {len(live) - count})."
            yield fact, "Keep them (kv='keep'), as grouped heads are."
    elif config.kv != "keep" and count:
        fact = f"kv={config.kv!r}: {count} of {len(live)} attentions keep their keys and values as they are."
        yield fact, "Use scaled_dot_product_attention without dropout, with a mask that compares positions."


def _no_use(config: Config, program: Program) -> Iterator[tuple[str, str]]:
    """Facts and remedies: what the loss, the token axes and the length of the example leave no use for."""
    losses, axes = program.activity.losses, program.axes.tokens
    for name, chosen in {"logits": config.logits == "drop", "report_loss": config.report_loss is not None}.items():
        if chosen and not losses:
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


def trains(inputs: Sequence[Any]) -> bool:
    """True when a graph is compiled for training: gradients are on and some input requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _is_continued(inputs: Sequence[Any]) -> bool:
    """True for the rest of a model that Dynamo split, which was reported with its first part."""
    return any(map(is_activation, inputs)) and compat.continues_a_split_model()


def refuse_part(program: Program, inputs: Sequence[Any]) -> None:
    """Raise ``GraphNotSupported`` for a compiled part of a model: a block between others would choose tokens of its own."""
    if not program.activity.losses and any(map(is_activation, inputs)):
        raise GraphNotSupported(
            "The compiled module is a part of a model: what it gets carries gradient and it returns no loss, so it would "
            "cut the gradient of the others at tokens of its own choice.",
            f"Compile the whole model, or {_GIVE}, for instance those of tokenseek_fx.seek(model, **batch).",
        )


def _refuse_second_compile() -> None:
    if compat.compiled_twice():
        raise ConfigError(
            "The model is compiled twice: model.compile(...) compiles it, and torch.compile(model, ...) around it has no "
            "effect. Use one of them; calling model.compile(...) again replaces its options."
        )


def split_at(gm: fx.GraphModule) -> GraphNotSupported | None:
    """What is wrong with a part of a model that Dynamo splits; to be asked while Dynamo compiles it."""
    if outer := compat.module_outside():
        return GraphNotSupported(
            f"Dynamo runs the forward of {type(outer).__name__} as plain Python, and a part of a model can't be rewritten.",
            _SHARDED if compat.is_sharded(outer) else _SPLIT,
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


def _warn_of_limit(limit: int) -> None:
    warnings.warn(
        f"tokenseek: Dynamo compiled this forward {limit} times, its recompile limit: what no compiled graph fits will run as plain "
        "PyTorch, without token selection. Compile with dynamic=True, pad to fewer lengths, or raise "
        "torch._dynamo.config.recompile_limit.",
        TokenSeekWarning,
        stacklevel=2,
    )
