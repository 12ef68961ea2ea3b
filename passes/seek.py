"""Seek: the whole forward without gradient, and what it tells about the tokens for the selection.

Only what is asked for is computed (``Signals``): values of this stream that nothing reads are dropped from the graph, so a
scorer that needs attention alone runs neither the last MLP nor the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree

from .activity import FindActivity
from .attend import laid_out_as
from .blocks import FindBlocks
from .canonicalize import Retrace
from .errors import GraphNotSupported
from .factors import same_size
from .geometry import Geometry, device_of, sizes_of
from .program import Program
from .received import attended_in, received_in
from .remake import Value
from .rules.op import bind, bind_values
from .rules.rows import LABEL_LOSSES, MEAN
from .select import ScoreInputs
from .streams import label_losses
from .tags import tagged
from .tail import TokenSignals, Traced, find_tail, head_input, run_tail, trace_tail
from .token_axes import SDPA, Attention, TokenAxis

aten = torch.ops.aten
#: Operations that pick rows out of a value.
_PICKS = (
    aten.select.int,
    aten.slice.Tensor,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.take_along_dim.default,
)


#: The kind of what keys and values are made from again.
_SOURCE = "block inputs"
_OTHERS = 'Choose scorer="attention" or scorer="random", which need neither.'


@dataclass(frozen=True)
class Signals:
    """What scores are made of.

    ``attention_layers``: the attentions that count, "last", "first", "all" or their numbers (negative: from the end); of
    several the sum. ``gradient_of``: "last_block", the input of the last block, or "head", that of the head.
    ``pinned``: positions that are always kept (negative: from the end). ``chunk_bytes``: the largest value that the chunked
    head makes at a time.
    """

    attention_layers: str | tuple[int, ...] = "last"
    gradient_of: str = "last_block"
    pinned: tuple[int, ...] = ()
    chunk_bytes: int = 12 * 2**20

    def attentions(self, program: Program, axis: TokenAxis) -> tuple[Attention, ...]:
        """The attentions that count for the tokens of an axis, of those that look at them."""
        every = tuple(a for a in program.axes.attentions if program.axes.keys_of(a) == axis)
        if not every:
            raise GraphNotSupported("No attention looks at these tokens.", 'Choose scorer="random".')
        if isinstance(self.attention_layers, str):
            return {"last": every[-1:], "first": every[:1], "all": every}[self.attention_layers]
        if bad := [i for i in self.attention_layers if not -len(every) <= i < len(every)]:
            raise GraphNotSupported(
                f"attention_layers={bad}: attentions of the model: {len(every)}.",
                "Number them from 0, or from -1 at the end.",
            )
        return tuple(every[i] for i in self.attention_layers)

    def tail(self, program: Program, needs: Iterable[str], full_loss: bool) -> Traced | None:
        """The traced way from the last block (or the head) to the loss, where ``needs`` or the ``full_loss`` ask for it."""
        gradient = "gradient" in needs
        if not (gradient or "loss" in needs or full_loss):
            return None
        if not program.activity.losses:
            raise GraphNotSupported("The graph has no loss, so tokens have neither a loss nor a gradient.", _OTHERS)
        tail = find_tail(*self._starts(program, gradient))
        if tail.loss is None and "loss" in needs:
            raise GraphNotSupported("The loss is not one cross entropy over tokens, so a token has no loss.", _OTHERS)
        return trace_tail(tail, gradient, self.chunk_bytes) if gradient or tail.loss is not None else None

    def has_gradient(self, program: Program, axis: TokenAxis) -> bool:
        """True when the tokens of an axis have a gradient where it is taken: those of a further axis at the last block alone."""
        program, starts = self._starts(program, gradient=True)
        return any(program.axes.axis_of(node) == axis for node in find_tail(program, starts).starts)

    def _starts(self, program: Program, gradient: bool) -> tuple[Program, list[fx.Node]]:
        """Where the tail starts, the first token axis first, in the program as if all were trained (scores don't depend on it)."""
        program = FindBlocks().run(FindActivity(frozen_too=True).run(program))
        block = gradient and self.gradient_of == "last_block"
        axes = program.axes
        first = program.blocks.last_entry(axes, axes.main) if block else head_input(program)
        if first is None:
            raise GraphNotSupported(
                "No value with tokens is on every path to the loss, so no block can be scored.", _OTHERS
            )
        others = [program.blocks.last_entry(axes, axis) for axis in axes.tokens[1:]] if block else []
        return program, [first, *(entry for entry in others if entry is not None)]


class Seek(Retrace):
    """The seek stream. ``values`` holds every node's value; ``sources``: what keys and values are made from again."""

    def __init__(self, program: Program, inputs: tuple[Any, ...], sources: frozenset[Value] = frozenset()) -> None:
        super().__init__(program.module)
        self.program, self.garbage_collect_values = program, False
        self._biases: dict[tuple[fx.Node, torch.dtype], Tensor] = {}
        self._positions: dict[TokenAxis, Tensor] = {}
        looked_at = {x for a in program.attending.values() for x in (a.key, a.value)}
        sources_as_they_are = {node for node, dtype in sources if dtype is None} - looked_at
        kinds = dict.fromkeys(looked_at, "keys/values") | dict.fromkeys(sources_as_they_are, _SOURCE)
        self._kept = {node: kind for node, kind in kinds.items() if isinstance(node.target, torch._ops.OpOverload)}
        self._casts = [(node, dtype) for node, dtype in sources if dtype is not None]
        #: Sources that autocast gives another dtype, in it.
        self.cast: dict[Value, Tensor] = {}
        self.run(*map(_without_grad, inputs))
        self.values: dict[fx.Node, Any] = self.env

    def run_node(self, n: fx.Node) -> Any:
        value = self._run_node(n)
        for source in (source for source in self._casts if source[0] is n):
            with tagged(_SOURCE, n):
                self.cast[source] = value.to(source[1])
        return value

    def _run_node(self, n: fx.Node) -> Any:
        """A mean over no label is 0, not NaN; attention by position where it can be."""
        if n in self.program.attending:
            with tagged("seek", n):
                return self._attend(n)
        value = self._seen_by_rows(n) if n in self._kept else super().run_node(n)
        if n.target not in LABEL_LOSSES or n not in self.program.activity.live:
            return value
        given = bind_values(n, self.env)
        if given["reduction"] != MEAN or given["target"].is_floating_point():
            return value
        with tagged("scoring"):
            return torch.where((given["target"] != given["ignore_index"]).any(), value, 0)

    def _attend(self, n: fx.Node) -> Tensor:
        """All tokens look at all keys."""
        attending, axes = self.program.attending[n], self.program.axes
        axis = axes.axis_of(attending.query)
        if axis not in self._positions:
            self._positions[axis] = self._everything(axis).indices
        return laid_out_as(n.meta["val"], attending(self.env, self.env[attending.query], self._positions[axis]))

    def _seen_by_rows(self, n: fx.Node) -> Any:
        """Keys and values, which rows look at, or what they are made from: kept for backward."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with tagged(self._kept[n], n):
            return self._after(self.call_function(n.target, args, kwargs))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict]:
        """As they are, but attentions share what a boolean mask adds to their scores."""
        mask = bind(n)["attn_mask"] if n.target is SDPA else None
        if mask is None or self.env[mask].dtype is not torch.bool:
            return super().fetch_args_kwargs_from_env(n)
        given = bind_values(n, self.env)
        return (), given | {"attn_mask": self._bias(mask, given["query"].dtype)}

    def _bias(self, mask: fx.Node, dtype: torch.dtype) -> Tensor:
        """0 where ``mask`` is True, else -inf: PyTorch makes it of a boolean mask for every attention anew, here it is made once."""
        if (mask, dtype) not in self._biases:
            shown = self.env[mask]
            bias = torch.zeros_like(shown, dtype=dtype).masked_fill(~shown, -torch.inf)
            # Inductor copies a value that is in no buffer for every kernel that it calls; as_strided puts it in one
            self._biases[mask, dtype] = bias.as_strided(bias.shape, bias.stride())
        return self._biases[mask, dtype]

    def get_attr(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return _without_grad(super().get_attr(target, args, kwargs))

    def nodes(self) -> dict[fx.Node, fx.Node]:
        """Where the tensors of this stream stand in the graph that is being traced."""
        mode = get_proxy_mode()
        if mode is None:
            return {}
        tensors = {node: value for node, value in self.values.items() if isinstance(value, Tensor)}
        found = {node: get_proxy_slot(x, mode.tracer, None, lambda p: p.proxy.node) for node, x in tensors.items()}
        return {node: place for node, place in found.items() if place is not None}

    def look(
        self,
        signals: Signals,
        needs: Mapping[TokenAxis, Iterable[str]],
        tail: Traced | None,
        noise: Mapping[TokenAxis, Tensor],
    ) -> dict[TokenAxis, ScoreInputs]:
        """What is known of the tokens of every axis; ``needs``: what is asked of them."""
        geometries = {axis: self._everything(axis) for axis in needs}
        told = TokenSignals(None, None, {})
        with tagged("scoring"):
            if tail is not None:
                told = run_tail(tail, self.values, geometries)
                self._replace_loss(tail, told.total)
            return {
                axis: replace(
                    self._look_at(geometries[axis], signals, needs[axis]),
                    noise=noise.get(axis),
                    loss=told.loss if axis == self.program.axes.main else None,
                    gradient=told.gradients.get(axis),
                )
                for axis in needs
            }

    def _everything(self, axis: TokenAxis) -> Geometry:
        """All rows of a token axis."""
        batch, tokens = sizes_of(self.program, axis, self.env)
        everything = torch.arange(tokens, device=device_of(self.program)).expand(batch, tokens)
        return Geometry(self.program.axes, axis, everything, batch, tokens)

    def _look_at(self, geometry: Geometry, signals: Signals, needs: Iterable[str]) -> ScoreInputs:
        axes, attending = self.program.axes, self.program.attending
        attention = None
        if "attention" in needs:
            looking = signals.attentions(self.program, geometry.axis)
            attention = sum(received_in(a, attending.get(a.out), self.values, geometry) for a in looking)
        first = next((a for a in axes.attentions if axes.keys_of(a) == geometry.axis), None)
        return ScoreInputs(
            geometry.batch,
            geometry.tokens,
            geometry.indices.device,
            attention=attention,
            labelled=self._labelled(geometry),
            attended=None if first is None else attended_in(first, attending.get(first.out), self.values, geometry),
            pinned=self._pinned(signals.pinned, geometry),
        )

    def _replace_loss(self, tail: Traced, total: Tensor | None) -> None:
        """The loss of the chunks instead of the one that needs all logits, and what is computed from it."""
        if total is not None:
            self.env[tail.tail.loss] = total
            for node in tail.tail.after_loss:
                self.env[node] = self.run_node(node)

    def _labelled(self, geometry: Geometry) -> Tensor | None:
        """The tokens that have a label in any loss over tokens; ``None``: there is no such loss."""
        found = None
        for node in label_losses(self.program):
            found = self._add_labels(bind(node), found, geometry)
        return found

    def _add_labels(self, given: dict[str, Any], found: Tensor | None, geometry: Geometry) -> Tensor | None:
        target, axes = given["target"], geometry.axes
        if target.meta["val"].is_floating_point() or not axes.has_rows_of(geometry.axis, target):
            return found
        labelled = self.values[target] != given["ignore_index"]
        mine = geometry.by_token(labelled, axes.of(target), axes.row_dim(target))
        return mine if found is None else found | mine

    def _pinned(self, positions: tuple[int, ...], geometry: Geometry) -> Tensor | None:
        """``positions`` and those that the model itself picks out of the sequence, for a classification head."""
        nodes = self.program.graph.nodes
        picks = [node for node in nodes if _picks_one_token(self.program, node, geometry.axis)]
        if not positions and not picks:
            return None
        number = torch.arange(geometry.tokens, device=geometry.indices.device)
        pinned = torch.zeros_like(number, dtype=torch.bool)
        for position in positions:
            pinned = pinned | (number == (position if position >= 0 else geometry.tokens + position))
        pinned = pinned.expand(geometry.batch, -1)
        for node in picks:
            pinned = pinned | self._read_by(node, geometry)
        return pinned

    def _read_by(self, node: fx.Node, geometry: Geometry) -> Tensor:
        """The tokens that an operation picks, [B, T] bool: it picks out of their numbers instead."""
        source, *rest = node.args
        number = torch.arange(geometry.batch * geometry.tokens, device=geometry.indices.device)
        number = geometry.like(number.reshape(geometry.batch, -1), self.values[source].shape, geometry.axes.of(source))
        args, kwargs = pytree.tree_map_only(fx.Node, self.values.__getitem__, (rest, node.kwargs))
        picked = node.target(number, *args, **kwargs).flatten()
        none = torch.zeros(geometry.batch * geometry.tokens, dtype=torch.bool, device=number.device)
        return none.scatter(0, picked, True).reshape(geometry.batch, -1)


def _picks_one_token(program: Program, node: fx.Node, axis: TokenAxis) -> bool:
    """True for a live operation that reads one row of every sequence (the position a classification head reads)."""
    if node.target not in _PICKS or node not in program.activity.live:
        return False
    source, axes = node.args[0], program.axes
    if source not in program.activity.live or not axes.has_rows_of(axis, source) or axes.row_dim(node) is not None:
        return False
    whole, part, tokens = source.meta["val"], node.meta["val"], axes.space.size(axis.token)
    return same_size(part.numel() * tokens, whole.numel())


def _without_grad(value: Any) -> Any:
    """Other values stay the very same: a scalar that Dynamo passes as a tensor is known by its identity."""
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
