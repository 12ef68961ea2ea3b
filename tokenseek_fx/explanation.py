"""Explain: report what the backend would do with a model, before any training."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.utils.flop_counter import FlopCounterMode

from . import compat
from .compilation import refuse_fragment, refuse_split, trains
from .config import Config
from .passes.analysis.activity import Activity
from .passes.analysis.losses import class_factors
from .passes.analysis.row_index import example_sizes
from .passes.analysis.token_axes import TokenAxes
from .passes.analysis.values import kind_of_value
from .passes.attention.positional import PositionalAttentions, read_by
from .passes.graph.errors import ConfigError, TokenSeekError
from .passes.graph.fake import fake_mode_of
from .passes.graph.kinds import Kind, kind_of, tag
from .passes.graph.nodes import hint
from .passes.graph.program import Program, module_path, source_line
from .passes.keep.recompute_kv import KVRecompute
from .passes.memory.audit import AuditSaved
from .passes.memory.lower_bound import lower_bound
from .passes.memory.saved import Audit, saved_edges
from .passes.pipeline import ANALYSED, training
from .passes.plan import Plan
from .passes.show import show_blocks
from .passes.streams.barriers import Barrier
from .passes.streams.rounds import Rounds
from .passes.streams.trace import Rewrite
from .passes.streams.two_streams import TwoStreams
from .rounds import rewrite

_MIB = 2**20
#: How often a step computes values that have no backward, by kind. Recomputed keys and values are computed for the
#: forward of the kept rows and for its backward.
_WITHOUT_GRADIENT = {
    **dict.fromkeys((None, Kind.SEEK, Kind.KEYS_VALUES, Kind.BLOCK_INPUTS, Kind.SCORING, Kind.SELECT), 1),
    Kind.RECOMPUTED: 2,
}


@dataclass(frozen=True)
class Explanation:
    """What the backend would do with a model. ``str()`` of it is the report; a notebook shows it as tables.

    Attributes:
        refusal: why the model would be compiled without token selection (all other fields are then empty), or ``None``.
        batch: number of sequences.
        tokens: T, the length of the loss's token axis.
        kept: k, the tokens that are kept of it in each sequence.
        others: (tokens, kept) of each further token axis.
        attentions: the attentions that the token axes were found from, with source lines; none if they are marked.
        losses: the operations whose loss becomes that of the kept tokens.
        row_ops: how many operations of the model with gradient run on the kept rows only, ...
        live_ops: ... out of this many.
        barriers: operations that run over all tokens.
        plain: the tensors that plain ``torch.compile`` saves for backward.
        rewritten: the tensors that the rewritten graph saves for backward.
        lower_bound: the least bytes that the rewritten graph has to save (``passes/memory/lower_bound.py``).
        recomputed_kv: for how many attentions keys and values are recomputed; ``None`` without ``kv="recompute"``.
        forwards: predicted cost of a training step, in forwards of the model (training on all tokens costs 3).
        rounds: in how many rounds backward runs the kept tokens.
        collected: bytes of the gradients of keys and values that the rounds collect.
        graphs: the rewritten graph as text, block by block (``passes.show.show_blocks``).
    """

    refusal: str | None = None
    batch: int = 0
    tokens: int = 0
    kept: int = 0
    others: tuple[tuple[int, int], ...] = ()
    attentions: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    row_ops: int = 0
    live_ops: int = 0
    barriers: tuple[Barrier, ...] = ()
    plain: Audit = field(default_factory=lambda: Audit(()))
    rewritten: Audit = field(default_factory=lambda: Audit(()))
    lower_bound: int = 0
    recomputed_kv: int | None = None
    forwards: float = 3.0
    rounds: int = 1
    collected: int = 0
    graphs: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        if self.refusal:
            return f"tokenseek: compiled without token selection.\n{self.refusal}"
        return "\n".join([*self._summary(), *self._barriers(), *self._memory(), *self._unexplained()])

    def _repr_html_(self) -> str:
        from .report.notebook import explanation_html

        return explanation_html(self)

    def _summary(self) -> list[str]:
        loss = ", ".join(self.losses) or "outside the graph: outputs for all tokens, gradient in the kept rows"
        found = f"found from {_some(len(self.attentions), 'attention')}:" if self.attentions else "marked in the model"
        return [
            f"tokenseek: keeps {self.kept} of {self.tokens} tokens in each of {self.batch} sequences",
            *(f"           and {kept} of {tokens} on a further token axis" for tokens, kept in self.others),
            f"  token axis    T = {self.tokens}, {found}",
            *(f"                {line}" for line in _counted(self.attentions)),
            f"  loss          {loss}",
            f"  operations    {self.row_ops} of {self.live_ops} with gradient run on the kept rows only",
            *self._keys_values(),
            *self._rounds(),
            f"  cost          {self.forwards:.2f} forwards a step (3.00 with all tokens)",
        ]

    def _keys_values(self) -> list[str]:
        if self.recomputed_kv is None:
            return []
        kept = "" if self.recomputed_kv == len(self.attentions) else ", kept for the others"
        return [
            f"  keys/values   recomputed for {self.recomputed_kv} of {_some(len(self.attentions), 'attention')}{kept}"
        ]

    def _rounds(self) -> list[str]:
        if self.rounds == 1:
            return []
        rows = -(-self.kept // self.rounds)
        collected = f"{self.collected / _MIB:.2f} MiB of gradients of keys and values are collected"
        return [f"  rounds        {self.rounds}, of {rows} rows in each sequence at most; {collected}"]

    def _barriers(self) -> list[str]:
        if not self.barriers:
            return ["  barriers      none"]
        return [
            f"  barriers      {_some(len(self.barriers), 'operation')} over all tokens:",
            *(f"    {b}" for b in self.barriers),
        ]

    def _memory(self) -> list[str]:
        kinds = sorted({*self.plain.by_kind(), *self.rewritten.by_kind()})
        rows = [(kind, self.plain.by_kind().get(kind, 0), self.rewritten.by_kind().get(kind, 0)) for kind in kinds]
        rows.append(("total", self.plain.bytes, self.rewritten.bytes))
        head = "  saved for backward (MiB)     all tokens     tokenseek"
        bound = f"    {'lower bound':<22} {'':>13} {self.lower_bound / _MIB:>13.2f}"
        return [head, *(f"    {kind:<22} {a / _MIB:>13.2f} {b / _MIB:>13.2f}" for kind, a, b in rows), bound]

    def _unexplained(self) -> list[str]:
        return [f"  saved for all tokens: {edge.name} {edge.shape} {edge.place}" for edge in self.rewritten.unexplained]


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **inputs: Any) -> Explanation:
    """Trace ``model(*args, **inputs)`` for training; print and return what the backend would do. Nothing is executed.

    ``options``: fields of ``Config``.

    Raises:
        ConfigError: an option is unknown or invalid, or is passed as an input of the model.

    >>> explain(model, **batch, options={"keep_ratio": 0.1})  # doctest: +SKIP
    """
    config = Config.from_options(options)
    _refuse_options(model, inputs)
    found: list[Explanation] = []
    first_graph(model, args, inputs, lambda gm, values: found.append(explain_graph(gm, values, config)))
    explanation = found[0] if found else Explanation("Dynamo found no graph to compile in the model.")
    print(explanation)
    return explanation


def _refuse_options(model: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an option among the inputs. A forward with ``**kwargs`` would ignore it silently."""
    taken = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    for name in {f.name for f in fields(Config)} & {*inputs} - {*taken}:
        raise ConfigError(
            f"{name}={inputs[name]!r} is an option, not an input of the model: pass it in options={{{name!r}: ...}}."
        )


def first_graph(
    model: torch.nn.Module,
    args: Sequence[Any],
    inputs: Mapping[str, Any],
    look: Callable[[fx.GraphModule, Sequence[Any]], None],
) -> None:
    """Call ``look`` with the first graph, and its inputs, that Dynamo traces of a model. Nothing is executed."""

    def seen(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        look(gm, example_inputs)
        return _stop

    plain = copy.copy(getattr(model, "_orig_mod", model))
    plain._compiled_call_impl = None
    try:
        with torch.enable_grad(), compat.unlimited_recompiles():
            torch.compile(plain, backend=seen)(*args, **inputs)
    except _Stop:
        pass


class _Stop(Exception):
    """Stops the forward when the graph is known."""


def _stop(*args: Any) -> None:
    raise _Stop


def explain_graph(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Explanation:
    """What the backend would do with a graph of Dynamo.

    Raises:
        ConfigError: an option has no effect, or the scorer fails.
    """
    if not trains(inputs):
        return Explanation("Nothing requires grad.")
    try:
        refuse_split(gm)
        plan = config.plan()
        plain = training(plan).run(Program(gm, tuple(inputs)), until=ANALYSED)
        refuse_fragment(plain, inputs)
        known = rewrite(plain, plan, AuditSaved(plan.kv))
    except ConfigError:
        raise
    except TokenSeekError as error:
        return Explanation(str(error))
    return _described(plain, known, plan)


def _described(plain: Program, rewritten: Program, plan: Plan) -> Explanation:
    assert plain[TokenAxes] and plain[Activity] and rewritten[Rewrite] and rewritten[Audit]
    sizes = [example_sizes(plain, axis) for axis in plain[TokenAxes].tokens]
    kept = [int(plan.select_of(i).kept(t)) for i, (_, t) in enumerate(sizes)]
    lengths = [int(tokens) for _, tokens in sizes]
    live = [node for node in plain.graph.nodes if node in plain[Activity].live and node.op == "call_function"]
    classes = class_factors(plain)
    for node in plain.graph.nodes:
        tag(node, kind_of_value(plain, node, classes))
    barriers, everything = rewritten[Rewrite].barriers, saved_edges(plain.module, plain.inputs)
    recomputed = rewritten[Audit].recomputed_share
    rounds = rewritten[Rounds].count
    at_once = [-(-kept[0] // rounds), *kept[1:]]
    shares = {axis: k / t for axis, k, t in zip(plain[TokenAxes].tokens, at_once, lengths, strict=True)}
    return Explanation(
        batch=int(sizes[0][0]),
        tokens=lengths[0],
        kept=kept[0],
        others=tuple(zip(lengths[1:], kept[1:], strict=True)),
        attentions=tuple(f"{a.node.target} {source_line(a.node)}" for a in plain[TokenAxes].attentions),
        losses=tuple(f"{n.target} {module_path(n)} {source_line(n)}" for n in plain[Activity].losses),
        row_ops=sum(plain[TokenAxes].has_rows(node) for node in live) - len({b.node for b in barriers}),
        live_ops=len(live),
        barriers=barriers,
        plain=everything,
        rewritten=rewritten[Audit],
        lower_bound=round(
            recomputed * lower_bound(plain, shares, plan.kv)
            + (1 - recomputed) * lower_bound(plain, shares, plan.kv, everything)
        ),
        recomputed_kv=len(rewritten[KVRecompute].attentions) if plan.kv.recomputes else None,
        forwards=predicted_forwards(plain, rewritten, recomputed),
        rounds=rounds,
        collected=sum(x.numel() * x.element_size() for x in rewritten[TwoStreams].collecting),
        graphs=tuple(show_blocks(rewritten)),
    )


def _some(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "s")


def _counted(lines: Sequence[str]) -> list[str]:
    return [f"{n} x {line}" if n > 1 else line for line, n in Counter(lines).items()]


def predicted_forwards(plain: Program, rewritten: Program, recomputed_share: float) -> float:
    """(seek stream + 3 x ditch stream + recomputation) / forward, in FLOPs of matrix products.

    Attention by position is excluded from both.
    """
    forward = _flops(plain.module, plain.inputs, _for_scores(plain)).total()
    step = flops_of_step(rewritten[Rewrite].module, rewritten[Rewrite].inputs, recomputed_share)
    of_rows = sum(count for kind, count in step.items() if kind not in _WITHOUT_GRADIENT)
    total = step.total() + (rewritten[Rounds].count - 1) * of_rows
    return total / forward if forward else 3.0


def flops_of_step(module: fx.GraphModule, inputs: Sequence[Any], recomputed_share: float = 0.0) -> Counter[str | None]:
    """FLOPs of matrix products in forward and backward of a rewritten graph, by ``Kind``.

    ``recomputed_share``: share of the kept rows' forward that the backward recomputes, 0 to 1.
    """
    flops = _flops(module, inputs)
    return Counter({kind: count * _WITHOUT_GRADIENT.get(kind, 3 + recomputed_share) for kind, count in flops.items()})


def _for_scores(program: Program) -> set[fx.Node]:
    """The attentions by position, and the nodes that only their attention weights depend on."""
    needed: set[fx.Node] = {program.graph.output_node()}
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(read_by(program, node))
    return {node for node in program.graph.nodes if node in program[PositionalAttentions] or node not in needed}


def _flops(module: fx.GraphModule, inputs: Sequence[Any], but: Set[fx.Node] = frozenset()) -> Counter[str | None]:
    """FLOPs by kind of node, counted on fake tensors, of all nodes except ``but``."""
    counts: Counter[str | None] = Counter()

    class Count(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = super().run_node(n)
            if n not in but:
                counts[kind_of(n)] += hint(counter.get_total_flops())
            return result

        def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
            if target is not invoke_subgraph:
                return super().call_function(target, args, kwargs)
            body, _, *operands = args
            return fx.Interpreter(body).run(*operands)

    with torch.no_grad(), fake_mode_of(inputs):
        Count(module).run(*inputs)
    return counts
