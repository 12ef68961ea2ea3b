"""Token axes: for every value of the graph, which factors of which dims are the token axis and the batch.

Found like a type is inferred: every dim gets a variable, the axes rule of each operation equates variables
(``factors.Space``), and attention names the class "token": the position axis that its rows and its keys share. So the axis
is found from any entry point, and never from a dim that happens to have the same size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from .errors import GraphNotSupported, InvariantBroken, NoAttention, NothingToSelect
from .factors import Axes, Dim, Space, same_size
from .program import Program
from .rules.axes import flow_of
from .rules.op import Flow, is_tensor, operands_of

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CONTRACTIONS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)
#: Operations that read their second operand at all positions.
ATTENDING = (SDPA, *_CONTRACTIONS)


#: The batch dim (``None``: one instance) and the token dim of a value.
Place = tuple[int | None, int]


@dataclass(frozen=True)
class Attention:
    """One attention: ``node`` is the SDPA call or the softmax of an eager one; the dims are those of its scores."""

    node: fx.Node
    leading: Axes
    query: Dim
    key: Dim


@dataclass(frozen=True)
class TokenAxes:
    """Axes of every value, and which factors are the token axis and the batch (``()``: one instance)."""

    space: Space
    axes: dict[fx.Node, tuple[Axes, ...]]
    flows: dict[fx.Node, Flow]
    attentions: tuple[Attention, ...]
    token: Dim = ()
    batch: Dim = ()

    def of(self, node: fx.Node) -> Axes:
        """The axes of a value in root factors (of its first tensor, where it has several)."""
        return self.resolved(self.axes[node][0])

    def token_dims(self, node: fx.Node) -> list[int]:
        return [i for i, dim in enumerate(self.of(node)) if find(self.token, dim) is not None]

    def row_dim(self, node: fx.Node) -> int | None:
        """The dim whose rows are tokens: the first that holds the token axis (of a score matrix: the query's)."""
        return next(iter(self.token_dims(node)), None)

    def resolved(self, axes: Axes) -> Axes:
        return tuple(self.space.resolve(dim) for dim in axes)

    def batch_dim_of(self, labels: Axes) -> int | None:
        return next((i for i, dim in enumerate(labels) if find(self.batch, dim) is not None), None)

    def has_rows(self, node: fx.Node) -> bool:
        """True when every instance has rows of its own in this value: it can be restricted to the selected ones."""
        return self.row_dim(node) is not None and (not self.batch or self.batch_dim_of(self.of(node)) is not None)

    def carried(self, node: fx.Node, operand: int, dim: int) -> int | None:
        """The dim of an operand that goes, row by row, to dim ``dim`` of the result; None: broadcast or mixed there."""
        flow = self.flows[node]
        if not flow.regrouped:
            return flow.carries[operand].get(dim)
        return self._regrouped_dim(operands_of(node)[operand], node, dim) if operand == 0 else None

    def _regrouped_dim(self, source: fx.Node, node: fx.Node, dim: int) -> int | None:
        before, after = self.of(source), self.of(node)
        if sum(before, ()) != sum(after, ()):
            return None
        start = len(sum(after[:dim], ())) + (find(self.token, after[dim]) or 0)
        ends = [len(sum(before[: i + 1], ())) for i in range(len(before))]
        found = next(i for i, end in enumerate(ends) if start < end)
        return found if find(self.token, before[found]) is not None else None


@dataclass(frozen=True)
class FindTokenAxes:
    """Infer the axes of every value and name the token axis. Reads ``module``; writes ``axes``.

    ``passed``: the batch dim (``None``: one instance) and the token dim of inputs, by position, where they are known from
    another part of the model; they name the token axis of a graph without attention.
    """

    passed: tuple[tuple[int, Place], ...] = ()
    name: str = "token axes"

    def run(self, program: Program) -> Program:
        found = inferred(program)
        if self.passed:
            return replace(program, axes=_named(program, found, self.passed))
        token = _token(found)
        return replace(program, axes=replace(found, token=token, batch=_batch(program, found, token)))

    def check(self, program: Program) -> None:
        """Every value has as many labelled dims as it has dims, and factor sizes multiply to its sizes."""
        assert program.axes is not None
        for node in filter(is_tensor, program.graph.nodes):
            shape, axes = node.meta["val"].shape, program.axes.of(node)
            sizes_agree = len(shape) == len(axes) and all(
                same_size(size, 1)
                or not torch.fx.experimental.symbolic_shapes.statically_known_true(program.axes.space.size(dim) != size)
                for dim, size in zip(axes, shape, strict=True)
            )
            if not sizes_agree:
                raise InvariantBroken(f"{node.name}: shape {tuple(shape)} but axes {axes}")


def inferred(program: Program) -> TokenAxes:
    """The axes of every value and the attentions; no axis has a name yet."""
    space, axes, flows = Space(), {}, {}
    for node in program.graph.nodes:
        flow = flow_of(node, space, axes)
        axes[node], flows[node] = flow.outputs, flow
    found = TokenAxes(space, axes, flows, ())
    found = replace(found, attentions=tuple(_attentions(program.graph, found)))
    return replace(found, attentions=_between_tokens(found))


def place_in(axes: TokenAxes, node: fx.Node) -> Place | None:
    """Where the batch and the token axis are dims of their own; ``None``: they are not."""
    labels, dim = axes.of(node), axes.row_dim(node)
    if dim is None or not axes.has_rows(node) or labels[dim] != axes.token:
        return None
    batch = axes.batch_dim_of(labels)
    return (batch, dim) if batch is None or labels[batch] == axes.batch else None


def _named(program: Program, found: TokenAxes, passed: tuple[tuple[int, Place], ...]) -> TokenAxes:
    """Named by the inputs."""
    nodes = program.placeholders
    index, (batch, token) = passed[0]
    labels = found.of(nodes[index])
    found = replace(found, token=labels[token], batch=() if batch is None else labels[batch])
    if not found.token:
        raise NothingToSelect("The sequence has a single token.")
    if any(place_in(found, nodes[i]) != place for i, place in passed):
        raise GraphNotSupported("The token axis of this part of the model is not the one of the parts before it.")
    return found


def find(needle: Dim, dim: Dim) -> int | None:
    """Where the factors ``needle`` stand, in order and together, in ``dim``."""
    n = len(needle)
    return next((i for i in range(len(dim) - n + 1) if n and dim[i : i + n] == needle), None)


def _attentions(graph: fx.Graph, found: TokenAxes) -> Iterator[Attention]:
    for node in graph.nodes:
        if node.target is SDPA:
            query, key = found.axes[node.args[0]][0], found.axes[node.args[1]][0]
            yield Attention(node, query[:-2], query[-2], key[-2])
        elif node.target in _SOFTMAX and _softmax_is_attention(node, found):
            scores = found.axes[node][0]
            yield Attention(node, scores[:-2], scores[-2], scores[-1])


def _softmax_is_attention(node: fx.Node, found: TokenAxes) -> bool:
    """A softmax over the last dim whose result is contracted over that dim."""
    rank = node.meta["val"].ndim
    return rank >= 3 and node.args[1] % rank == rank - 1 and _reaches_contraction(node, found)


def _reaches_contraction(node: fx.Node, found: TokenAxes) -> bool:
    """Through operations that keep the last two dims, ``node`` becomes the left operand of a matmul-like one."""
    for user in node.users:
        if user.target in _CONTRACTIONS and _left_operand(user) is node:
            return True
        keeps = is_tensor(user) and len(operands_of(user)) == 1 and found.of(user)[-2:] == found.of(node)[-2:]
        if keeps and _reaches_contraction(user, found):
            return True
    return False


def _left_operand(node: fx.Node) -> fx.Node:
    return operands_of(node)[0]


def _between_tokens(found: TokenAxes) -> tuple[Attention, ...]:
    """All attentions but those of a single query over several keys (pooling by attention), where there are others."""
    resolve = found.space.resolve
    others = tuple(a for a in found.attentions if resolve(a.query) or not resolve(a.key))
    return others or found.attentions


def _token(found: TokenAxes) -> Dim:
    """The token axis: the class that the queries and the keys of every attention share."""
    if not found.attentions:
        raise NoAttention("No attention was found in the graph.", "Token selection needs a transformer.")
    resolve = found.space.resolve
    classes = {resolve(a.query): a for a in found.attentions} | {resolve(a.key): a for a in found.attentions}
    if () in classes:
        raise NothingToSelect("The sequence has a single token.")
    if len(classes) > 1:
        raise GraphNotSupported(
            f"The attentions of the graph run over {len(classes)} different token axes.",
            "Encoder-decoders, cross-attention and key/value caches are not rewritten yet.",
            list(classes.values())[-1].node,
        )
    return next(iter(classes))


def _batch(program: Program, found: TokenAxes, token: Dim) -> Dim:
    """The batch: the leading factors of attention that also belong to the data the model is called with: of the inputs that
    are no parameters those that hold the token axis, or, where none does (images), all of them."""
    leading = [f for dim in found.attentions[0].leading for f in found.space.resolve(dim)]
    inputs = zip(program.placeholders, program.inputs, strict=True)
    given = [found.of(node) for node, value in inputs if not isinstance(value, torch.nn.Parameter)]
    data = [axes for axes in given if any(find(token, dim) is not None for dim in axes)] or given
    # a dim that also holds something else is a feature dim (heads x head dim), not a batch
    pure = {f for axes in data for dim in axes if set(dim) <= {*leading, *token} for f in dim}
    return tuple(f for f in leading if f in pure and f not in token)
