"""Token axes: for every value of the graph, which factors of which dims are a token axis and its batch.

Axes are inferred as types are: every dim is a variable, the axes rule of each operation equates variables
(``factors.Space``), and attention names the class "token": the position axis of its queries. So the axis is found
whatever the inputs are, and a dim of the same size is never mistaken for it. An encoder-decoder has two token axes,
since no operation equates them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from ..graph.errors import GraphNotSupported, InvariantBroken, NoAttention, NothingToSelect, located
from ..graph.factors import Axes, Dim, Space, same_size
from ..graph.nodes import is_tensor, operands_of
from ..graph.op_sets import LABEL_LOSSES
from ..graph.program import Program
from ..rules.attention import attention_op
from ..rules.axes import flow_of
from ..rules.op import Flow
from .attentions import Attention, attentions_in, scores_of

_WANTED = (
    "Token selection needs a transformer whose attention can be traced: scaled_dot_product_attention, or matmul and "
    'softmax (transformers: attn_implementation="sdpa" or "eager").'
)
#: The batch dim (``None``: one instance) and the token dim of a value.
RowPlace = tuple[int | None, int]


@dataclass(frozen=True)
class TokenAxis:
    """A token axis: the positions ``token`` of every instance of ``batch`` (``()``: one instance)."""

    token: Dim
    batch: Dim = ()

    def batch_dim_of(self, labels: Axes) -> int | None:
        """The dim with the batch in a value with these axes; ``None`` if it has no batch."""
        return next((i for i, dim in enumerate(labels) if find(self.batch, dim) is not None), None)


@dataclass(frozen=True)
class TokenAxes:
    """The axes of every value, and which of them are token axes.

    Args:
        space: the factors.
        axes: for every node, the axes of each of its tensors.
        flows: how axes flow through every node.
        attentions: the attentions, in order.
        tokens: the token axes, the axis of the loss first.
        pooling: scores of a single query over tokens (attention pooling); the tokens are keys, so these values have no
            rows.
    """

    space: Space
    axes: dict[fx.Node, tuple[Axes, ...]]
    flows: dict[fx.Node, Flow]
    attentions: tuple[Attention, ...]
    tokens: tuple[TokenAxis, ...] = ()
    pooling: frozenset[fx.Node] = frozenset()

    @property
    def main(self) -> TokenAxis:
        """The token axis of the loss."""
        return self.tokens[0]

    def of(self, node: fx.Node) -> Axes:
        """The axes of a value in root factors (of its first tensor if it has several)."""
        return self.resolved(self.axes[node][0])

    def axis_at(self, label: Dim) -> TokenAxis | None:
        """The token axis in a dim with this label."""
        return next((axis for axis in self.tokens if find(axis.token, label) is not None), None)

    def token_dims(self, node: fx.Node) -> list[int]:
        """The dims of a value that have a token axis."""
        if node in self.pooling:
            return []
        return [i for i, dim in enumerate(self.of(node)) if self.axis_at(dim) is not None]

    def row_dim(self, node: fx.Node) -> int | None:
        """The dim whose rows are tokens: the first with a token axis (of a score matrix, that of the queries)."""
        return next(iter(self.token_dims(node)), None)

    def axis_of(self, node: fx.Node) -> TokenAxis | None:
        """The token axis of a value's rows."""
        dim = self.row_dim(node)
        return None if dim is None else self.axis_at(self.of(node)[dim])

    def keys_of(self, attention: Attention) -> TokenAxis | None:
        """The token axis of an attention's keys."""
        return self.axis_at(self.space.resolve(attention.key))

    def queries_of(self, attention: Attention) -> TokenAxis | None:
        """The token axis of an attention's queries."""
        return self.axis_at(self.space.resolve(attention.query))

    def resolved(self, axes: Axes) -> Axes:
        """``axes`` in root factors."""
        return tuple(self.space.resolve(dim) for dim in axes)

    def has_rows(self, node: fx.Node) -> bool:
        """True if every instance has its own rows in this value, so that it can be restricted to the kept rows."""
        axis = self.axis_of(node)
        return axis is not None and (not axis.batch or axis.batch_dim_of(self.of(node)) is not None)

    def has_rows_of(self, axis: TokenAxis, node: fx.Node) -> bool:
        """True if the value has rows, and they are those of this token axis."""
        return self.axis_of(node) == axis and self.has_rows(node)

    def carried(self, node: fx.Node, operand: int, dim: int) -> int | None:
        """The dim of an operand that is carried, row by row, to dim ``dim`` of the result, if there is one."""
        flow = self.flows[node]
        if not flow.regrouped:
            return flow.carries[operand].get(dim)
        return self._regrouped_dim(operands_of(node)[operand], node, dim) if operand == 0 else None

    def _regrouped_dim(self, source: fx.Node, node: fx.Node, dim: int) -> int | None:
        before, after = self.of(source), self.of(node)
        axis = self.axis_at(after[dim])
        wanted = axis.token if axis is not None else after[dim]
        if sum(before, ()) != sum(after, ()):
            return None
        start = len(sum(after[:dim], ())) + (find(wanted, after[dim]) or 0)
        ends = [len(sum(before[: i + 1], ())) for i in range(len(before))]
        found = next((i for i, end in enumerate(ends) if start < end), None)
        return found if found is not None and find(wanted, before[found]) is not None else None


@dataclass(frozen=True)
class FindTokenAxes:
    """Infer the axes of every value and find the token axes.

    Reads ``module``; writes ``TokenAxes``.

    Args:
        passed: the batch dim (``None``: one instance) and the token dim of inputs, by position, known from another
            fragment of the model; they name the token axis of a graph without attention.

    Raises:
        NoAttention: the graph has no attention.
        NothingToSelect: the sequences have a single token.
        GraphNotSupported: attention runs within windows, or ``passed`` does not match.
    """

    passed: tuple[tuple[int, RowPlace], ...] = ()
    name: str = "token axes"

    def run(self, program: Program) -> Program:
        found = inferred(program)
        named = _passed(program, found, self.passed) if self.passed else replace(found, tokens=_tokens(program, found))
        return program.with_(named)

    def check(self, program: Program) -> None:
        """Every value has one label per dim, and the sizes of factors multiply to the sizes of dims."""
        for node in filter(is_tensor, program.graph.nodes):
            shape, axes = node.meta["val"].shape, program[TokenAxes].of(node)
            sizes_agree = len(shape) == len(axes) and all(
                same_size(size, 1)
                or not torch.fx.experimental.symbolic_shapes.statically_known_true(
                    program[TokenAxes].space.size(dim) != size
                )
                for dim, size in zip(axes, shape, strict=True)
            )
            if not sizes_agree:
                raise InvariantBroken(f"{node.name}: shape {tuple(shape)} but axes {axes}")


def inferred(program: Program) -> TokenAxes:
    """The axes of every value and the attentions; the token axes are not named yet."""
    space, axes, flows = Space(), {}, {}
    for node in program.graph.nodes:
        with located(node):
            flow = flow_of(node, space, axes)
        axes[node], flows[node] = flow.outputs, flow
    found = TokenAxes(space, axes, flows, ())
    every = tuple(attentions_in(program.graph, found))
    single = [a for a in every if not space.resolve(a.query) and space.resolve(a.key)]
    queries = {space.resolve(a.query) for a in every}
    pooling = [a for a in single if space.resolve(a.key) in queries and attention_op(a.node) is None]
    scores = (node for a in pooling for node in scores_of(a, found))
    between_tokens = tuple(a for a in every if a not in single)
    return replace(found, attentions=between_tokens or every, pooling=frozenset(scores))


def place_in(axes: TokenAxes, node: fx.Node) -> RowPlace | None:
    """The batch dim and the token dim of a value; ``None`` if the batch or the token axis is not a dim of its own."""
    labels, dim, axis = axes.of(node), axes.row_dim(node), axes.axis_of(node)
    if dim is None or axis is None or not axes.has_rows(node) or labels[dim] != axis.token:
        return None
    batch = axis.batch_dim_of(labels)
    return (batch, dim) if batch is None or labels[batch] == axis.batch else None


def _passed(program: Program, found: TokenAxes, passed: tuple[tuple[int, RowPlace], ...]) -> TokenAxes:
    """The token axis named by the inputs."""
    nodes = program.placeholders
    index, (batch, token) = passed[0]
    labels = found.of(nodes[index])
    if not labels[token]:
        raise NothingToSelect("The sequence has a single token.")
    found = replace(found, tokens=(TokenAxis(labels[token], () if batch is None else labels[batch]),))
    if any(place_in(found, nodes[i]) != place for i, place in passed):
        raise GraphNotSupported(
            "The token axis of this fragment of the model differs from that of the fragments before it.",
            "Find what splits the model with torch.compile(..., fullgraph=True).",
        )
    return found


def find(needle: Dim, dim: Dim) -> int | None:
    """The index in ``dim`` of the factors ``needle``, adjacent and in order; ``None`` if they are not there."""
    n = len(needle)
    return next((i for i in range(len(dim) - n + 1) if n and dim[i : i + n] == needle), None)


def _tokens(program: Program, found: TokenAxes) -> tuple[TokenAxis, ...]:
    """The query axes of all attentions, that of the loss first.

    Without a loss over labels, the axis of the last attention is first.
    """
    if not found.attentions:
        raise NoAttention("No attention was found in the graph.", _WANTED)
    queries = {found.space.resolve(a.query): a for a in reversed(found.attentions)}
    queries.pop((), None)
    if not queries:
        if many := [a.node for a in found.attentions if found.space.resolve(a.key)]:
            raise GraphNotSupported("Every attention has a single query.", "Let one have a query per token.", many[0])
        raise NothingToSelect("The sequence has a single token.")
    axes = [TokenAxis(token, _batch(program, found, token, attention)) for token, attention in queries.items()]
    for axis in axes:
        _refuse_windows(axis, queries, found)
    trained = {factor for node in program.graph.nodes for factor in _rows_of_loss(node, found)}
    return tuple(sorted(axes, key=lambda axis: not trained & {*axis.token}))


def _rows_of_loss(node: fx.Node, found: TokenAxes) -> Dim:
    """The factors of the positions of a loss over labels."""
    return sum(found.of(operands_of(node)[1]), ()) if node.target in LABEL_LOSSES else ()


def _refuse_windows(axis: TokenAxis, queries: dict[Dim, Attention], found: TokenAxes) -> None:
    """Refuse attention within windows or along rows of an image: its axis is a part of the positions of a sequence."""
    attention = queries[axis.token]
    beside = {f for dim in found.resolved(attention.leading) for f in dim} - {*axis.batch}
    beside.update(f for token in queries if token != axis.token for f in token)
    dims = (dim for values in found.axes.values() for labels in values for dim in found.resolved(labels))
    if any(beside & {*dim} and {*axis.token} & {*dim} for dim in dims):
        raise GraphNotSupported(
            "Attention runs within windows of the tokens, so its rows are not those of the sequences.",
            "Use attention over all tokens with a mask.",
            attention.node,
        )


def _batch(program: Program, found: TokenAxes, token: Dim, attention: Attention) -> Dim:
    """The batch: the leading factors of attention that also belong to the data.

    Data are the inputs that are not parameters: the dims of those that have the token axis, or, if none has it
    (images), the first dim of the others.
    """
    leading = [f for dim in attention.leading for f in found.space.resolve(dim)]
    inputs = zip(program.placeholders, program.inputs, strict=True)
    given = [found.of(node) for node, value in inputs if not isinstance(value, torch.nn.Parameter)]
    having = [dim for axes in given if any(find(token, dim) is not None for dim in axes) for dim in axes]
    first = [axes[0] for axes in given if len(axes) > 1]
    for dims in (having, first):
        # a dim with other factors too is a feature dim (heads x head dim), not a batch
        pure = {f for dim in dims if set(dim) <= {*leading, *token} for f in dim}
        if batch := tuple(f for f in leading if f in pure and f not in token):
            return batch
    return ()
