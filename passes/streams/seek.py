"""Seek stream: the forward of all tokens without gradient (prefill), and the signals of the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

from ..analysis.activity import Activity
from ..analysis.losses import label_losses
from ..analysis.row_index import RowIndex, device_of, sizes_of
from ..analysis.token_axes import TokenAxes, TokenAxis
from ..attention.positional import PositionalAttentions, laid_out_as
from ..attention.received import attended_in
from ..capture.retrace import Retrace
from ..graph.factors import same_size
from ..graph.kinds import Kind, Mark, tagged
from ..graph.nodes import bind, bind_values
from ..graph.op_sets import LABEL_LOSSES, MEAN, PICKS
from ..graph.program import Program
from ..graph.traced import node_of
from ..keep.recompute_kv import Value
from ..rules.attention import attention_op
from .select import SIGNALS, ScoreInputs
from .signals import Prefill, Signals
from .token_loss import TokenSignals, Traced, run_tail

aten = torch.ops.aten


class Seek(Retrace):
    """The seek stream; ``values`` has the value of every node.

    ``sources``: values from which keys and values are recomputed.
    """

    def __init__(self, program: Program, inputs: tuple[Any, ...], sources: frozenset[Value] = frozenset()) -> None:
        super().__init__(program.module)
        self.program, self.garbage_collect_values = program, False
        self._biases: dict[tuple[fx.Node, torch.dtype], Tensor] = {}
        self._positions: dict[TokenAxis, Tensor] = {}
        looked_at = {x for a in program[PositionalAttentions].values() for x in (a.key, a.value)}
        as_they_are = {node for node, dtype in sources if dtype is None} - looked_at
        kinds = dict.fromkeys(looked_at, Kind.KEYS_VALUES) | dict.fromkeys(as_they_are, Kind.BLOCK_INPUTS)
        self._kept = {node: kind for node, kind in kinds.items() if isinstance(node.target, torch._ops.OpOverload)}
        self._casts = [(node, dtype) for node, dtype in sources if dtype is not None]
        #: Sources that autocast converts, in the other dtype.
        self.cast: dict[Value, Tensor] = {}
        #: The nodes of this stream's tensors in the graph that is being traced.
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.run(*map(_without_grad, inputs))
        self.values: dict[fx.Node, Any] = self.env

    def run_node(self, n: fx.Node) -> Any:
        value = self._run_node(n)
        self._note(n, value)
        for source in (source for source in self._casts if source[0] is n):
            with tagged(Kind.BLOCK_INPUTS, n):
                self.cast[source] = value.to(source[1])
        return value

    def _run_node(self, n: fx.Node) -> Any:
        """Run a node; a mean over no label is 0 instead of NaN, and attention by position is used if it qualifies."""
        if n in self.program[PositionalAttentions]:
            with tagged(Kind.SEEK, n):
                return self._attend(n)
        value = self._seen_by_rows(n) if n in self._kept else super().run_node(n)
        if n.target not in LABEL_LOSSES or n not in self.program[Activity].live:
            return value
        given = bind_values(n, self.env)
        if given["reduction"] != MEAN or given["target"].is_floating_point():
            return value
        with tagged(Kind.SCORING):
            return torch.where((given["target"] != given["ignore_index"]).any(), value, 0)

    def _attend(self, n: fx.Node) -> Tensor:
        """All tokens attend to all keys."""
        attention, axes = self.program[PositionalAttentions][n], self.program[TokenAxes]
        axis = axes.axis_of(attention.query)
        if axis not in self._positions:
            self._positions[axis] = self._everything(axis).indices
        return laid_out_as(n.meta["val"], attention(self.env, self.env[attention.query], self._positions[axis]))

    def _seen_by_rows(self, n: fx.Node) -> Any:
        """Keys and values that rows attend to, or the values that they are recomputed from: kept for backward."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        kind = self._kept[n]
        with tagged(kind, n, Mark.KEYS_VALUES if kind is Kind.KEYS_VALUES else None):
            return self._after(self.call_function(n.target, args, kwargs))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple, dict]:
        """The arguments of a node; attentions share the bias that a boolean mask adds to their scores."""
        given = attention_op(n)
        mask = given.mask if given is not None and given.takes_bias else None
        if mask is None or self.env[mask].dtype is not torch.bool:
            return super().fetch_args_kwargs_from_env(n)
        bias = self._bias(mask, self.env[given.query].dtype)
        return fx.map_arg((n.args, n.kwargs), lambda x: bias if x is mask else self.env[x])

    def _bias(self, mask: fx.Node, dtype: torch.dtype) -> Tensor:
        """0 where ``mask`` is True, else -inf, computed once; PyTorch computes it for every attention."""
        if (mask, dtype) not in self._biases:
            shown = self.env[mask]
            bias = torch.zeros_like(shown, dtype=dtype).masked_fill(~shown, -torch.inf)
            # as_strided puts the bias in a buffer; without one, Inductor copies it for every kernel that reads it
            self._biases[mask, dtype] = bias.as_strided(bias.shape, bias.stride())
        return self._biases[mask, dtype]

    def get_attr(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return _without_grad(super().get_attr(target, args, kwargs))

    def _note(self, node: fx.Node, value: Any) -> None:
        """Note the node of a value in the traced graph: now, since an operation that returns its operand moves it."""
        if isinstance(value, Tensor) and (place := node_of(value)) is not None:
            self.nodes[node] = place

    def look(
        self,
        signals: Signals,
        needs: Mapping[TokenAxis, Iterable[str]],
        tail: Traced | None,
        noise: Mapping[TokenAxis, Tensor],
    ) -> dict[TokenAxis, ScoreInputs]:
        """The inputs of the scorer for every token axis.

        Args:
            signals: the options of the signals.
            needs: the requested signals of every axis.
            tail: the traced scoring tail.
            noise: the noise of the axes that need it.
        """
        row_indices = {axis: self._everything(axis) for axis in needs}
        told = TokenSignals(None, None, {})
        with tagged(Kind.SCORING):
            if tail is not None:
                told = run_tail(tail, self.values, row_indices)
                self._replace_loss(tail, told.total)
            return {
                axis: self._look_at(
                    Prefill(self.program, self.values, row_indices[axis], signals, told, noise.get(axis)), needs[axis]
                )
                for axis in needs
            }

    def _everything(self, axis: TokenAxis) -> RowIndex:
        """The row index of all rows of a token axis."""
        batch, tokens = sizes_of(self.program, axis, self.env)
        everything = torch.arange(tokens, device=device_of(self.program)).expand(batch, tokens)
        return RowIndex(self.program[TokenAxes], axis, everything, batch, tokens)

    def _look_at(self, prefill: Prefill, needs: Iterable[str]) -> ScoreInputs:
        axes, positional, row_index = self.program[TokenAxes], self.program[PositionalAttentions], prefill.row_index
        first = next((a for a in axes.attentions if axes.keys_of(a) == row_index.axis), None)
        known = ScoreInputs(
            row_index.batch,
            row_index.tokens,
            row_index.indices.device,
            labelled=self._labelled(row_index),
            attended=None if first is None else attended_in(first, positional.get(first.out), self.values, row_index),
            pinned=self._pinned(prefill.signals.pinned, row_index),
        )
        return known.with_signals(
            {name: SIGNALS[name].compute(prefill) for name in sorted({*needs, *self._told(prefill)})}
        )

    @staticmethod
    def _told(prefill: Prefill) -> Iterator[str]:
        """Signals that are known in any case and therefore recorded."""
        if prefill.tail.loss is not None:
            yield "loss"
        if prefill.tail.gradients:
            yield "gradient"

    def _replace_loss(self, tail: Traced, total: Tensor | None) -> None:
        """Replace the loss that needs all logits by that of the chunks, and recompute what depends on it."""
        if total is not None:
            self.env[tail.tail.loss] = total
            self._note(tail.tail.loss, total)
            for node in tail.tail.after_loss:
                self.env[node] = self.run_node(node)

    def _labelled(self, row_index: RowIndex) -> Tensor | None:
        """The tokens with a label in any loss over tokens; ``None`` if there is no such loss."""
        found = None
        for node in label_losses(self.program):
            found = self._add_labels(bind(node), found, row_index)
        return found

    def _add_labels(self, given: dict[str, Any], found: Tensor | None, row_index: RowIndex) -> Tensor | None:
        target, axes = given["target"], row_index.axes
        if target.meta["val"].is_floating_point() or not axes.has_rows_of(row_index.axis, target):
            return found
        labelled = self.values[target] != given["ignore_index"]
        mine = row_index.by_token(labelled, axes.of(target), axes.row_dim(target))
        return mine if found is None else found | mine

    def _pinned(self, positions: tuple[int, ...], row_index: RowIndex) -> Tensor | None:
        """``positions`` and the positions that the model itself picks from the sequence, for a classification head."""
        nodes = self.program.graph.nodes
        picks = [node for node in nodes if _picks_one_token(self.program, node, row_index.axis)]
        if not positions and not picks:
            return None
        number = torch.arange(row_index.tokens, device=row_index.indices.device)
        pinned = torch.zeros_like(number, dtype=torch.bool)
        for position in positions:
            pinned = pinned | (number == (position if position >= 0 else row_index.tokens + position))
        pinned = pinned.expand(row_index.batch, -1)
        for node in picks:
            pinned = pinned | self._read_by(node, row_index)
        return pinned

    def _read_by(self, node: fx.Node, row_index: RowIndex) -> Tensor:
        """The tokens that an operation picks, bool [B, T], found by running it on token numbers."""
        source, *rest = node.args
        number = torch.arange(row_index.batch * row_index.tokens, device=row_index.indices.device)
        number = row_index.like(
            number.reshape(row_index.batch, -1), self.values[source].shape, row_index.axes.of(source)
        )
        args, kwargs = pytree.tree_map_only(fx.Node, self.values.__getitem__, (rest, node.kwargs))
        picked = node.target(number, *args, **kwargs).flatten()
        none = torch.zeros(row_index.batch * row_index.tokens, dtype=torch.bool, device=number.device)
        return none.scatter(0, picked, True).reshape(row_index.batch, -1)


@disable_proxy_modes_tracing()  # sizes are compared, which is no step of the forward
def _picks_one_token(program: Program, node: fx.Node, axis: TokenAxis) -> bool:
    """True for a live operation that reads one row per sequence (the position that a classification head reads)."""
    if node.target not in PICKS or node not in program[Activity].live:
        return False
    source, axes = node.args[0], program[TokenAxes]
    if source not in program[Activity].live or not axes.has_rows_of(axis, source) or axes.row_dim(node) is not None:
        return False
    whole, part, tokens = source.meta["val"], node.meta["val"], axes.space.size(axis.token)
    return same_size(part.numel() * tokens, whole.numel())


def _without_grad(value: Any) -> Any:
    """A tensor without gradient; any other value unchanged.

    A value without gradient keeps its identity, by which a scalar that Dynamo passes as a tensor is known.
    """
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
