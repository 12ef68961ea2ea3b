"""Ditch: the graph executed twice, once for all tokens without gradient, once for the selected rows with gradient.

1. **Seek stream**: every input detached. It gives the forward values, each attention's keys and values, and the scores.
2. **Select**: scores -> sorted row indices ``[B, k]``.
3. **Ditch stream**: every live operation re-executed on the selected rows (``rules/rows.py``). Where tokens mix, it uses the
   full values of the seek stream with its own rows put in their place. An operation that can't be restricted is a
   *barrier*: run in full on such values, its rows gathered again. Always exact, saves less; reported.

The pass is an interpreter with a table of rules, traced back to a graph.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .call import Call, pad_left
from .canonicalize import Retrace, is_autocast, record_opaque
from .errors import GraphNotSupported, InvariantBroken
from .factors import Axes
from .fake import fake_mode_of
from .geometry import Geometry, device_of, example_sizes, sizes_of
from .program import Program, attribute, where
from .rules.axes import rule_for
from .rules.op import is_tensor, operands_of, tensors_in
from .rules.rows import LABEL_LOSSES, LOSSES, ROWS_RULES, rerun
from .token_axes import ATTENDING

aten = torch.ops.aten
#: Operations that only lay out what they get. A full value is put together before them, so that keys and values are
#: whole before heads are repeated.
_LAYOUT_NAMES = (
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute expand t numpy_T contiguous clone"
)
_LAYOUT = {
    getattr(packet, overload)
    for packet in (getattr(aten, name) for name in _LAYOUT_NAMES.split())
    for overload in packet.overloads()
}

#: ``select(batch, tokens, device, noise) -> (scores [B, T], indices [B, k] sorted)``
Select = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Barrier:
    """An operation that the ditch stream runs over all tokens: why, where, and the bytes of its full operands."""

    node: fx.Node
    reason: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.node.target} at {where(self.node)}: {self.reason} ({self.bytes / 2**20:.1f} MiB in full)"


@dataclass(frozen=True)
class Rewrite:
    """The rewritten forward ``module(*inputs) -> (*outputs, scores, indices)``; ``inputs`` are those of the program, then
    the scorer's noise if it needs any."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    barriers: tuple[Barrier, ...]


@dataclass(frozen=True)
class Ditch:
    """Trace the two streams. Reads ``axes`` and ``activity``; writes ``rewrite``.

    ``select``: the selection, traced into the graph. ``logits``: "keep" returns them in full, "drop" with length 0.
    ``noise``: the graph gets one more input, a float32 ``[B, T]`` of uniform noise.
    """

    select: Select
    logits: str = "keep"
    noise: bool = False
    name: str = "ditch"

    def run(self, program: Program) -> Program:
        assert program.axes is not None and program.activity is not None
        barriers: list[Barrier] = []

        def forward(*args: Any) -> tuple:
            inputs, noise = args[: len(program.inputs)], args[len(program.inputs) :]
            seek = Seek(program, inputs)
            geometry = seek.geometry(self.select, noise)
            streams = Streams(program, seek.values, geometry, inputs, barriers)
            streams.run()
            outputs = self._outputs(program, streams)
            for index, update in zip(program.mutated, program.updates, strict=True):
                inputs[index].copy_(seek.values[update])
            return (*outputs, seek.scores, geometry.indices)

        inputs = (*program.inputs, *self._noise(program))
        with warnings.catch_warnings(), fx_traceback.preserve_node_meta(), fake_mode_of(inputs):
            warnings.filterwarnings("ignore", message=".*pre-dispatch.*")
            module = make_fx(forward, pre_dispatch=True, tracing_mode="real")(*inputs)
        _name_placeholders(module, program)
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_autocast(node))
        module.recompile()
        return replace(program, rewrite=Rewrite(module, inputs, tuple(barriers)))

    def check(self, program: Program) -> None:
        """The graph is well-formed and has every output of the model, the scores and the indices."""
        assert program.rewrite is not None
        graph = program.rewrite.module.graph
        graph.lint()
        if len(graph.output_node().args[0]) != len(program.outputs) + 2:
            raise InvariantBroken("The rewritten graph lost an output.")

    def _noise(self, program: Program) -> tuple[torch.Tensor, ...]:
        if not self.noise:
            return ()
        with fake_mode_of(program.inputs):
            batch, tokens = example_sizes(program)
            return (torch.empty(batch, tokens, device=device_of(program)),)

    def _outputs(self, program: Program, streams: Streams) -> Iterator[Any]:
        """Losses live, the rest as the full forward has it; without a loss, values in full that live in the kept rows."""
        assert program.activity is not None
        classes = class_factors(program)
        for out in program.outputs:
            if not isinstance(out, fx.Node):
                yield out
            elif out not in program.activity.live:
                yield streams.seek[out]
            elif out in program.activity.losses or not program.activity.losses:
                yield streams.full(out)
            elif self.logits == "drop" and is_tensor(out) and classes & set(sum(program.axes.of(out), ())):
                yield _without_tokens(streams, out)
            else:
                yield streams.seek[out].detach()


class Seek(Retrace):
    """The seek stream: the whole forward without gradient. ``values`` holds every node's value."""

    def __init__(self, program: Program, inputs: tuple[Any, ...]) -> None:
        super().__init__(program.module)
        self.program, self.garbage_collect_values = program, False
        self.run(*pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs))
        self.values: dict[fx.Node, Any] = self.env

    def get_attr(self, target: Any, args: tuple, kwargs: dict) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value

    def geometry(self, select: Select, noise: tuple[torch.Tensor, ...]) -> Geometry:
        batch, tokens = sizes_of(self.program, self.values)
        with tagged("select"):
            self.scores, indices = select(batch, tokens, device_of(self.program), *noise)
        return Geometry(self.program.axes, indices, batch, tokens)


class Streams:
    """The ditch stream beside the seek stream: for every live node its selected rows, or (without rows) its whole value."""

    def __init__(
        self, program: Program, seek: dict, geometry: Geometry, inputs: tuple, barriers: list[Barrier]
    ) -> None:
        self.program, self.axes, self.live = program, program.axes, program.activity.live
        self.seek, self.geometry, self.barriers = seek, geometry, barriers
        self._inputs = dict(zip(program.placeholders, inputs, strict=True))
        self._rows: dict[fx.Node, Any] = {}
        self._whole: dict[fx.Node, Any] = {}
        self._merged: dict[fx.Node, torch.Tensor] = {}
        self._switches = Retrace(program.module)

    def run(self) -> None:
        classes = class_factors(self.program)
        for node in self.program.graph.nodes:
            if is_autocast(node):
                self._switches.env[node] = self._switches.run_node(node)
            elif node in self.live:
                kind = kind_of(self.program, node, classes)
                with tagged("rows" if kind in ("activations", "keys/values") else kind, node):
                    self._compute(node)

    def full(self, node: fx.Node) -> Any:
        """The value for all tokens: live in the selected rows, the seek stream's elsewhere."""
        if node not in self.live:
            return self.seek[node]
        if node in self._whole:
            return self._whole[node]
        if node not in self._merged:
            with tagged("keys/values" if _feeds_attention(node) else "barrier", node):
                self._merged[node] = self._merge(node)
        return self._merged[node]

    def rows(self, node: fx.Node, dim: int) -> torch.Tensor:
        """The selected rows of a value along one of its token dims."""
        if node in self._rows and dim == self.axes.row_dim(node):
            return self._rows[node]
        return self.geometry.take(self.full(node), self.axes.of(node), dim)

    def aligned_rows(
        self, value: Any, labels: Axes, dim: int, like: Axes, result: torch.Tensor, rank: int
    ) -> torch.Tensor:
        """Rows of a value that all instances share, where it meets a result with axes ``like``: it gets a batch dim."""
        if not self.axes.batch or self.axes.batch_dim_of(labels) is not None:
            return self.geometry.take(value, labels, dim)
        padded = pad_left(labels, rank)
        value = value.reshape((1,) * (rank - len(labels)) + tuple(value.shape))
        at = self.axes.batch_dim_of(like)
        if at is None or padded[at]:
            raise GraphNotSupported("A value that all instances share meets per-instance rows at a dim that is taken.")
        value = value.expand([result.shape[at] if i == at else size for i, size in enumerate(value.shape)])
        padded = tuple(like[at] if i == at else label for i, label in enumerate(padded))
        return self.geometry.take(value, padded, dim + rank - len(labels))

    # -- one node -----------------------------------------------------------------------------------------------------

    def _compute(self, node: fx.Node) -> None:
        if node.op != "call_function":
            self._source(node)
        elif node.target is operator.getitem:
            self._getitem(node)
        else:
            self._operation(node)

    def _source(self, node: fx.Node) -> None:
        value = self._inputs[node] if node.op == "placeholder" else attribute(self.program.module, str(node.target))
        if self.axes.has_rows(node):
            self._rows[node] = self.geometry.take(value, self.axes.of(node), self.axes.row_dim(node))
        else:
            self._whole[node] = value

    def _getitem(self, node: fx.Node) -> None:
        source, index = node.args
        if source in self._rows:
            self._rows[node] = self._rows[source][index]
        else:
            self._whole[node] = self._whole[source][index]

    def _operation(self, node: fx.Node) -> None:
        has_rows = self.axes.has_rows(node)
        call = Call(node, self, self.axes.row_dim(node) if has_rows else None)
        result = self._restricted(call) if self._meets_rows(node) else NotImplemented
        if result is NotImplemented:
            result = self._in_full(call)
            if has_rows:
                result = self._take_each(node, result)
        elif has_rows:
            self._check_shape(call, result)
        (self._rows if has_rows else self._whole)[node] = result

    def _meets_rows(self, node: fx.Node) -> bool:
        """False for operations on parameters and values without rows alone (they run as they are, in full)."""
        return self.axes.has_rows(node) or any(self.axes.has_rows(arg) for arg in operands_of(node) if arg in self.live)

    def _restricted(self, call: Call) -> Any:
        rule = ROWS_RULES.get(call.target)
        if rule is None and call.dim is None:
            return NotImplemented
        return (rule or rerun)(call)

    def _in_full(self, call: Call) -> Any:
        node = call.node
        if node.target in LOSSES:
            self._refuse_partial_loss(node)
        if self._meets_rows(node):
            self._report(node)
        args, kwargs = call.in_full
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return record_opaque(node.target, args, kwargs, node.meta["val"])
        return node.target(*args, **kwargs)

    def _refuse_partial_loss(self, node: fx.Node) -> None:
        """A loss per instance is an ordinary loss; one over some part of the tokens has no kept share."""
        operand = self.axes.of(node.args[0])
        positions = operand[:1] + operand[2:] if node.target in LABEL_LOSSES else ()
        unknown = set(sum(positions, ())) - set(self.axes.batch)
        if unknown or set(sum(operand, ())) & self.axes.space.parts_of(self.axes.token):
            raise GraphNotSupported(
                "The loss runs over positions that are neither all tokens nor one per sequence (a part of the tokens "
                "chosen before the loss), so its kept share is not defined.",
                "Give all tokens to the loss and mark the others with ignore_index in the labels.",
                node,
            )

    def _report(self, node: fx.Node) -> None:
        reason = "it mixes tokens" if rule_for(node.target) else "the operation has no rule"
        merged = [arg for arg in dict.fromkeys(operands_of(node)) if arg in self.live and self.axes.has_rows(arg)]
        self.barriers.append(Barrier(node, reason, sum(_bytes(arg) for arg in merged)))

    def _take_each(self, node: fx.Node, result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return self.geometry.take(result, self.axes.of(node), self.axes.row_dim(node))
        return tuple(
            self.geometry.take(x, self.axes.resolved(axes), self.axes.row_dim(node))
            if isinstance(x, torch.Tensor)
            else x
            for x, axes in zip(result, self.axes.axes[node], strict=True)
        )

    def _check_shape(self, call: Call, result: Any) -> None:
        """The rows of a result have the shape of its rows (a rule that lies about an axis would broadcast silently)."""
        if isinstance(result, torch.Tensor) and list(result.shape) != call.shape:
            raise InvariantBroken(
                f"{call.node.target} on the selected rows gave shape {list(result.shape)}, its axes say {call.shape} "
                f"(at {where(call.node)})."
            )

    def _merge(self, node: fx.Node) -> torch.Tensor:
        if node.target in _LAYOUT and len(operands_of(node)) == 1:
            args, kwargs = Call(node, self, None).in_full
            return node.target(*args, **kwargs)
        return self.geometry.put(self.seek[node], self._rows[node], self.axes.of(node), self.axes.row_dim(node))


@contextmanager
def tagged(kind: str, node: fx.Node | None = None) -> Iterator[None]:
    """Nodes traced inside carry the place of ``node`` and ``meta["custom"]["tokenseek"] = kind``."""
    before = fx_traceback.current_meta
    place = node.meta if node is not None else before
    fx_traceback.current_meta = {**place, "custom": {**place.get("custom", {}), "tokenseek": kind}}
    try:
        yield
    finally:
        fx_traceback.current_meta = before


def kind_of(program: Program, node: fx.Node, classes: set[int]) -> str:
    """What a value is, for reports: logits (it has one of the ``classes`` factors), scores (two token axes), keys/values,
    or activations."""
    if not is_tensor(node):
        return "activations"
    if classes & set(sum(program.axes.of(node), ())):
        return "logits"
    if len(program.axes.token_dims(node)) > 1:
        return "scores"
    return "keys/values" if _feeds_attention(node) else "activations"


def _feeds_attention(node: fx.Node) -> bool:
    """True when attention reads the value at all positions: its keys or values, or the right side of its products."""
    return any(
        (node in user.args[1:3] and user.target in ATTENDING) or (user.target in _LAYOUT and _feeds_attention(user))
        for user in node.users
    )


def class_factors(program: Program) -> set[int]:
    """The factors of the class dim of the losses: outputs that have them are logits."""
    losses = [n for n in program.graph.nodes if n.target in LABEL_LOSSES and n in program.activity.live]
    logits = [program.axes.of(n.args[0]) for n in losses]
    return {factor for labels in logits for factor in labels[min(1, len(labels) - 1)]}


def _without_tokens(streams: Streams, node: fx.Node) -> torch.Tensor:
    """An empty tensor in place of ``node``, made without computing it."""
    value, geometry, axes = streams.seek[node], streams.geometry, streams.axes
    sizes = {axes.token: 0, axes.batch: geometry.batch}
    shape = [sizes.get(label, size) if label else size for label, size in zip(axes.of(node), value.shape, strict=True)]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _name_placeholders(module: fx.GraphModule, program: Program) -> None:
    """Inputs keep the names that they had."""
    for new, old in zip(module.graph.find_nodes(op="placeholder"), program.placeholders, strict=False):
        new.target = new.name = old.name


def _bytes(node: fx.Node) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_in(node.meta["val"]))
