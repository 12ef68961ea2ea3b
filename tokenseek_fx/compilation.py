"""The backend: ``torch.compile(model, backend="tokenseek", options={...})``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from . import compat
from .compiled import Compiled, KeepAll, Rewritten, RowWise, WithRows, check_rows, is_activation, unknown_tokens
from .config import Config, ConfigError
from .given import given
from .passes.analysis.activity import Activity
from .passes.analysis.row_index import example_sizes
from .passes.analysis.token_axes import RowPlace, TokenAxes
from .passes.graph.errors import GraphNotSupported, NoAttention, NothingToSelect, bugs_reported, in_pass
from .passes.graph.fake import fake_inputs
from .passes.graph.nodes import hint
from .passes.graph.program import Program, source_line
from .passes.keep.kv_modes import KVMode
from .passes.lower.split import Segments
from .passes.memory.partition import partition_of, partitioning
from .passes.memory.recompute import RecomputePlan
from .passes.pipeline import ANALYSED, training
from .passes.streams.rounds import Rounds
from .planner import within_budget
from .rounds import InRounds, rewrite
from .variants import Variants, floats_read
from .warnings import TokenSeekWarning

Passed = tuple[tuple[int, RowPlace], ...]
#: In a graph without backward, Inductor inlines the residual stream into its readers, layer after layer. Then every
#: layer needs kernels of its own, and the outputs of several layers are alive at once (docs/design/0001).
_REWRITTEN = {"realize_reads_threshold": 1}

_SELECT = "select the same rows for all fragments: `with tokenseek_fx.selecting(indices): ...`"
_FIND = 'Find the cause with torch.compile(model, backend="tokenseek", fullgraph=True)'
_SHARDED = "FSDP2 gathers every sharded block by hooks. Shard the model as one unit, with fully_shard(model) only"
#: What to do about a graph break, by a part of its reason or of its place; otherwise ``_FIND``.
_REMEDIES = {
    "capture_scalar_outputs": "Compile with fullgraph=True, which traces a number that is read from a tensor.",
    "Dynamic shape": "Keep the sizes: leave positions out by ignore_index or torch.where, instead of indexing.",
    "output_capturing.py": "transformers adds hooks in the first forward that collects these outputs: call the model "
    "once with the same arguments before you compile it.",
    "backwards hooks": "Remove the backward hooks of its modules: a torch.autograd.Function in the forward can read or "
    "change a gradient.",
}
#: The calls of ``torch.compile`` whose split was reported: other fragments of the model don't repeat it.
_reported = WeakSet[Any]()

compat.ignore_logging_in_forward()
compat.compile_copies_of("tokenseek_fx")


def tokenseek(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """The Dynamo backend registered as ``"tokenseek"``. ``options``: fields of ``Config``. ``mode``: Inductor's mode.

    Raises:
        ConfigError: an option is unknown or invalid.
        GraphNotSupported: the graph can't be rewritten exactly, and the option ``strict`` is set.
    """
    return compile_graph(gm, inputs, Config.from_options(options, mode))


def backend(config: Config | None = None) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """The backend as a callable, for ``torch.compile(model, backend=tokenseek_fx.backend(Config(...)))``.

    Raises:
        ConfigError: ``config`` is not a ``Config``.
    """
    if not isinstance(config, Config | None):
        raise ConfigError(
            f"backend(...) got a {type(config).__name__}: expected a Config. Pass a dict of options to "
            'torch.compile(model, backend="tokenseek", options={...}).'
        )
    chosen = config or Config()
    return lambda gm, inputs: compile_graph(gm, inputs, chosen)


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Compiled:
    """Compile one graph of Dynamo: unchanged if nothing is trained, else to train on chosen or given rows.

    Raises:
        GraphNotSupported: the graph can't be rewritten exactly, and ``config.strict`` is set.
        ConfigError: an option has no effect, the scorer fails, or the model is compiled twice.
    """
    _refuse_second_compile()
    if not trains(inputs):
        return inner_compiler(config)(gm, inputs)
    if limit := compat.reaches_recompile_limit():
        _warn_of_limit(limit)
    return Trained(gm, inputs, config)


class Trained:
    """A compiled training graph. It compiles lazily: for chosen rows and, under ``selecting``, for given rows."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> None:
        self.gm, self.config, self.examples = gm, config, fake_inputs(gm, inputs)
        self.split, self.call = split_at(gm), compat.compiled_call()
        #: the graph is a fragment of the model: other graphs, or plain Python, may run before or after it
        self.is_fragment = self.split is not None or any(map(is_activation, inputs))
        is_lazy = given() is not None or config.rounds > 1
        self.own = self._lazily(self._compile_own) if is_lazy else self._compile_own(inputs)
        self.with_rows: dict[Any, Variants] = {}
        self.attends = True

    def __call__(self, *args: Any) -> Any:
        rows = given()
        if rows is None:
            return self.own(*args)
        passed = () if self.attends else rows.passed(args)
        try:
            return self._variants(len(rows.tensors), passed)(*args, *rows.tensors)
        except NoAttention:  # the token axis is known only from values that other fragments passed
            self.attends = False
            return self(*args)

    def _variants(self, count: int, passed: Passed) -> Variants:
        if (count, passed) not in self.with_rows:
            compile = partial(bugs_reported()(self._compile_with_rows), count=count, passed=passed)
            self.with_rows[count, passed] = self._lazily(compile)
        return self.with_rows[count, passed]

    def _lazily(self, compile: Callable[[tuple[Any, ...]], Compiled]) -> Variants:
        """The graph compiled when it is called; in rounds with static sizes, as their parts are numbers."""
        return Variants(self.examples, compile, self.config.rounds > 1, floats_read(self.gm))

    def _compile_own(self, inputs: Sequence[Any]) -> Compiled:
        if self.split is not None and self.call is not None and not self.config.strict:
            if self.call in _reported:
                return inner_compiler(self.config)(self.gm, inputs)
            _reported.add(self.call)
        return _compile_own(self.gm, inputs, self.config, self.split)

    def _compile_with_rows(self, inputs: Sequence[Any], count: int, passed: Passed) -> Compiled:
        """The graph for given rows, which are the last ``count`` inputs; unchanged if that is exact for any rows.

        Raises:
            GraphNotSupported: the graph can't be rewritten exactly.
        """
        inputs, rows = tuple(inputs[:-count]), tuple(inputs[-count:])
        plan = self.config.plan(rows, self.is_fragment, passed)
        pipeline = training(plan)
        known = pipeline.run(Program(self.gm, inputs), until="activity")
        try:
            program = pipeline.run(known, until=ANALYSED)
        except NothingToSelect:
            return RowWise(inner_compiler(self.config)(self.gm, inputs), known, parallel=False)
        except NoAttention:
            if self.attends:
                raise
            if known[Activity].losses:
                raise unknown_tokens("a loss") from None
            return RowWise(inner_compiler(self.config)(self.gm, inputs), known)
        check_rows(program, tuple(map(hint, example_sizes(program, program[TokenAxes].main))))
        program = rewrite(program, plan)
        with in_pass("compile"):
            why = "" if self.split is None else self.split.fact
            return WithRows(compile_segments(program, self.config), program, self.is_fragment, why)


def _compile_own(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, split: GraphNotSupported | None
) -> Compiled:
    """The graph compiled to choose its rows; unchanged, with a warning, if it can't be rewritten."""
    try:
        if split is not None:
            raise split
        with bugs_reported():
            return _compile_rewritten(gm, inputs, config)
    except NothingToSelect:
        pass
    except GraphNotSupported as error:
        if config.strict:
            raise
        _warn(gm, error)
    return inner_compiler(config)(gm, inputs)


def _compile_rewritten(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Compiled:
    """The graph analysed, rewritten and compiled; nothing of this runs elsewhere, so that every error can fall back.

    Raises:
        GraphNotSupported: the graph can't be rewritten exactly.
    """
    plan = config.plan()
    program = training(plan).run(Program(gm, tuple(inputs)), until=ANALYSED)
    refuse_fragment(program, inputs)
    if plan.keeps_all(program):
        return KeepAll(inner_compiler(config)(gm, inputs), program)
    config = within_budget(gm, inputs, config)
    plan = config.plan()
    known = rewrite(program, plan)
    if replace(plan, rounds=known[Rounds].count).keeps_all(program):
        return KeepAll(inner_compiler(config)(gm, inputs), program)
    with in_pass("compile"):
        return Rewritten(compile_segments(known, config), known, config.seed)


def compile_segments(program: Program, config: Config) -> Callable[..., Sequence[Any]]:
    """The segments of a rewritten program, compiled."""
    recomputed, kv = program[RecomputePlan].segments, config.plan().kv
    segments = program[Segments].compiled(
        lambda number, segment, taken: _compiled_segment(segment, taken, config, kv, number < recomputed)
    )
    return InRounds(segments, program) if segments.phases else segments


def _compiled_segment(
    segment: fx.GraphModule, inputs: Sequence[Any], config: Config, kv: KVMode, recompute: bool
) -> Compiled:
    """Compile a segment. ``recompute``: backward recomputes its forward."""
    partition = partition_of(segment, inputs, recompute, kv)
    if config.inner == "aot_eager":
        return compat.aot_eager(partition)(segment, inputs)
    with partitioning(partition):
        return inner_compiler(config, _REWRITTEN)(segment, inputs)


def inner_compiler(
    config: Config, defaults: Mapping[str, Any] | None = None
) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """The inner compiler. ``defaults``: Inductor options that the user's options override."""
    if config.inner == "inductor":
        return compat.inductor(config.mode, {**(defaults or {}), **(config.inductor_options or {})})
    return lookup_backend(config.inner)  # type: ignore[return-value]


def trains(inputs: Sequence[Any]) -> bool:
    """True if a graph is compiled for training: gradients are enabled and some input requires one."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def refuse_fragment(program: Program, inputs: Sequence[Any]) -> None:
    """Raise ``GraphNotSupported`` for a fragment of a model: it would choose tokens of its own."""
    if not program[Activity].losses and any(map(is_activation, inputs)):
        raise GraphNotSupported(
            "The compiled module is a fragment of a model: an input carries gradient and it returns no loss. It would "
            "choose its own tokens and cut the gradient of the other fragments there.",
            f"Compile the whole model, or {_SELECT}, for example those of tokenseek_fx.seek(model, **batch).",
        )


def _refuse_second_compile() -> None:
    if compat.compiled_twice():
        raise ConfigError(
            "The model is compiled twice: after model.compile(...), torch.compile(model, ...) has no effect. "
            "Use one of them; another model.compile(...) replaces the options."
        )


def split_at(gm: fx.GraphModule) -> GraphNotSupported | None:
    """The error for a fragment of a model that Dynamo splits, or ``None``. Call it while Dynamo compiles the graph."""
    outside = compat.modules_outside()
    plain = [(code, module) for code, module in outside if not compat.is_split(code)]
    if plain:
        fact = f"Dynamo runs the forward of {type(plain[-1][1]).__name__} as plain Python"
        place = next((found for code, _ in plain if (found := compat.skipped_at(code))), None)
        why = " It can't trace {1}:{2} ({0}).".format(*place) if place else ""
        return _split_error(
            fact, why, place, _SHARDED if any(compat.is_sharded(module) for _, module in outside) else _FIND
        )
    if place := compat.graph_break(gm):
        return _split_error("Dynamo split the model at {1}:{2} ({0})".format(*place), "", place)
    if resumed := compat.resumed_at():
        return _split_error("Dynamo split the model at {}:{}".format(*resumed))
    return _split_error("Dynamo split the model") if outside else None


def _split_error(fact: str, why: str = "", place: Any = (), remedy: str = _FIND) -> GraphNotSupported:
    """``place``: reason and place of the graph break, if known."""
    text = " ".join(map(str, place or ()))
    remedy = next((known for part, known in _REMEDIES.items() if part in text), f"{remedy}, or {_SELECT}.")
    return GraphNotSupported(f"{fact}, and a fragment of a model can't be rewritten.{why}", remedy)


def refuse_split(gm: fx.GraphModule) -> None:
    """Raise ``GraphNotSupported`` for a fragment of a model that Dynamo splits."""
    if (error := split_at(gm)) is not None:
        raise error


def _warn(gm: fx.GraphModule, error: GraphNotSupported) -> None:
    place = next((place for node in gm.graph.nodes if (place := source_line(node))), "")
    here = f"Compiled without token selection {place}".strip()
    warnings.warn(f"tokenseek: {error} {here}.", TokenSeekWarning, stacklevel=2)


def _warn_of_limit(limit: int) -> None:
    warnings.warn(
        f"tokenseek: Dynamo compiled this forward {limit} times, its recompile limit. Inputs that fit no compiled "
        "graph will run as plain PyTorch, without token selection. Compile with dynamic=True, pad to fewer lengths, or "
        "raise torch._dynamo.config.recompile_limit.",
        TokenSeekWarning,
        stacklevel=2,
    )
