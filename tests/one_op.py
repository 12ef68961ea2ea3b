"""One operation through the real passes: its axes, with any axis as the token axis, and its streams, run eagerly.

A ``Case`` is one row of the operation table. Its operands are written in named axes: ``"b t i, o i, o"``. A letter is
an axis with a size of its own, ``(t d)`` is a merged dim, ``1`` a dim of size 1. A small letter is a different axis in
each operand until the rule unifies them; a capital letter is the same axis everywhere, as if the rest of the graph had
unified it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from tokenseek_fx.passes.analysis.activity import Activity, FindActivity
from tokenseek_fx.passes.analysis.moved_rows import MovedRows
from tokenseek_fx.passes.analysis.routing import Routes
from tokenseek_fx.passes.analysis.row_index import RowIndex
from tokenseek_fx.passes.analysis.token_axes import TokenAxes, TokenAxis, find
from tokenseek_fx.passes.attention.positional import PositionalAttentions
from tokenseek_fx.passes.graph.factors import Axes, Dim, Space
from tokenseek_fx.passes.graph.program import Program
from tokenseek_fx.passes.rules.axes import flow_of
from tokenseek_fx.passes.streams.barriers import Barrier
from tokenseek_fx.passes.streams.ditch_stream import DitchStream

SIZES = (2, 4, 3, 5, 6, 7)


@dataclass(frozen=True)
class Case:
    """An operation, its operands in named axes, and the axes along which its rows are independent (``rows``).

    ``args(n, *operands)``: its arguments; ``n.t`` is the size of axis t (p: a pair) and ``n.dim`` a dim (1 unless
    drawn). The first word of a term may be its kind: ``bool``, ``complex``, ``unit`` (from 0 to 1), ``const`` (without
    gradient) or ``<v`` (integers below the size of v).
    ``shares``: axes that, as the batch, may be absent from an operand with the tokens, which is then broadcast.
    """

    op: Any
    operands: str
    rows: str
    args: Callable[..., tuple]
    kwargs: dict[str, Any]
    shares: str = ""

    @property
    def terms(self) -> list[str]:
        return [term.strip() for term in self.operands.split(",")]

    @property
    def letters(self) -> list[str]:
        text = re.sub("bool|complex|unit|const", "", self.operands)
        return list(dict.fromkeys(re.findall("[A-Za-z]", text)))

    def sizes(self, sizes: Sequence[int] = SIZES, dim: int = 1) -> SimpleNamespace:
        return SimpleNamespace(**{**dict(zip(self.letters, sizes, strict=False)), "p": 2, "dim": dim})

    def __str__(self) -> str:
        return f"{getattr(self.op, '__name__', self.op)}({self.operands})"


def _kind(term: str) -> tuple[str, str]:
    """``"<v b t"`` -> (``"<v"``, ``"b t"``)."""
    head, _, rest = term.partition(" ")
    return (head, rest) if head in ("bool", "complex", "unit", "const") or head.startswith("<") else ("", term)


def _dims(axes: str) -> list[str]:
    """``"b (t d) 1"`` -> ``["b", "td", ""]``."""
    return [re.sub(r"[() 1]", "", dim) for dim in re.findall(r"\([^)]*\)|\S", axes)]


def draw(case: Case, n: SimpleNamespace, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random operands."""
    return [_random(*_kind(term), n, dtype) for term in case.terms]


def _random(kind: str, axes: str, n: SimpleNamespace, dtype: torch.dtype) -> Tensor:
    shape = [_size(dim, n) for dim in _dims(axes)]
    if kind.startswith("<"):
        return torch.randint(getattr(n, kind[1:]), shape)
    if kind == "bool":
        return torch.rand(shape) < 0.7
    if kind == "unit":
        return torch.rand(shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype.to_complex() if kind == "complex" else dtype)


def _size(dim: str, n: SimpleNamespace) -> int:
    return int(torch.tensor([getattr(n, letter) for letter in dim], dtype=torch.int64).prod())


@dataclass(frozen=True)
class OneOp:
    """A graph of one operation: its operands are placeholders, its tensor results are returned."""

    program: Program
    axes: TokenAxes
    node: fx.Node
    results: tuple[fx.Node, ...]
    names: dict[str, list[Dim]]

    @property
    def operands(self) -> list[fx.Node]:
        return self.program.placeholders

    def values(self, operands: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """The value of every node of the graph."""
        values: dict[fx.Node, Any] = dict(zip(self.operands, operands, strict=True))
        for node in (self.node, *(result for result in self.results if result is not self.node)):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        return values

    def named(self, token: Dim, batch: Dim) -> OneOp:
        """The same with these axes as the token axis and the batch."""
        resolve = self.axes.space.resolve
        axes = replace(self.axes, tokens=(TokenAxis(resolve(token), resolve(batch)),))
        return replace(self, axes=axes, program=self.program.with_(axes))


def build(case: Case, n: SimpleNamespace, operands: Sequence[Tensor]) -> OneOp:
    """The graph of the operation on these operands, with the axes that its rule gives."""
    graph, space, names = fx.Graph(), Space(), {}
    placeholders = [graph.placeholder(f"x{i}") for i in range(len(operands))]
    axes: dict[fx.Node, tuple[Axes, ...]] = {}
    for node, term, value in zip(placeholders, case.terms, operands, strict=True):
        node.meta["val"] = value
        axes[node] = (_axes(_kind(term)[1], n, space, names),)
    node = graph.call_function(case.op, case.args(n, *placeholders), case.kwargs)
    node.meta["val"] = _call(node, dict(zip(placeholders, operands, strict=True)))
    results = tuple(_results(graph, node))
    graph.output(results)
    flows = {}
    for x in dict.fromkeys((node, *results)):
        flows[x] = flow_of(x, space, axes)
        axes[x] = flows[x].outputs
    program = Program(fx.GraphModule(torch.nn.Module(), graph), tuple(operands))
    found = TokenAxes(space, axes, flows, ())
    program = FindActivity().run(program).with_(found, Routes(), MovedRows(), PositionalAttentions())
    return OneOp(program, found, node, results, names)


def _axes(axes: str, n: SimpleNamespace, space: Space, names: dict[str, list[Dim]]) -> Axes:
    def factor(letter: str) -> Dim:
        if letter.islower() or letter not in names:
            names.setdefault(letter, []).append(space.fresh(getattr(n, letter)))
        return names[letter][-1]

    return tuple(sum((factor(letter) for letter in dim), ()) for dim in _dims(axes))


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)


def _results(graph: fx.Graph, node: fx.Node) -> Iterator[fx.Node]:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        yield node
        return
    for i, part in enumerate(value):
        item = graph.call_function(operator.getitem, (node, i))
        item.meta["val"] = part
        yield item


# -- rows by coordinates, without passes/analysis/row_index.py --------------------------------------------------------


def coordinate(space: Space, label: Dim, needle: Dim) -> Tensor:
    """The coordinate of every index of a dim along the factors ``needle`` of its label."""
    at = find(needle, label)
    assert at is not None
    return torch.arange(space.size(label)) // space.size(label[at + len(needle) :]) % space.size(needle)


def rows_index(axes: TokenAxes, labels: Axes, dim: int, indices: Tensor) -> tuple[Tensor, ...]:
    """The index for which ``value[index]`` is the selected rows of ``value`` along ``dim``."""
    size, label, kept = axes.space.size, labels[dim], indices.shape[1]
    start = find(axes.main.token, label)
    assert start is not None
    before, after = label[:start], label[start + len(axes.main.token) :]
    counts = [
        kept * size(label) // size(axes.main.token) if i == dim else size(other) for i, other in enumerate(labels)
    ]
    grid = list(torch.meshgrid(*(torch.arange(count) for count in counts), indexing="ij"))
    outer, inner = grid[dim] // (kept * size(after)), grid[dim] % size(after)
    instance = torch.zeros_like(outer)
    if axes.main.batch:
        if find(axes.main.batch, before) is not None:
            instance = coordinate(axes.space, before, axes.main.batch)[outer]
        elif find(axes.main.batch, after) is not None:
            instance = coordinate(axes.space, after, axes.main.batch)[inner]
        else:
            at = next(i for i, other in enumerate(labels) if find(axes.main.batch, other) is not None)
            instance = coordinate(axes.space, labels[at], axes.main.batch)[grid[at]]
    token = indices[instance, grid[dim] // size(after) % kept]
    grid[dim] = (outer * size(axes.main.token) + token) * size(after) + inner
    return tuple(grid)


def selection(op: OneOp) -> Tensor:
    """Half of the rows of every instance, random and sorted."""
    tokens, batch = op.axes.space.size(op.axes.main.token), op.axes.space.size(op.axes.main.batch)
    return torch.rand(batch, tokens).argsort(1)[:, : tokens // 2].sort(1).values


def ditch(op: OneOp, operands: Sequence[Tensor], indices: Tensor) -> tuple[dict[fx.Node, Tensor], list[Barrier]]:
    """The operation in the ditch stream: its results, restricted if they have rows, and its barriers."""
    axes = op.axes
    row_index = RowIndex(axes, axes.main, indices, axes.space.size(axes.main.batch), axes.space.size(axes.main.token))
    seek = op.values([x.detach() for x in operands])
    streams = DitchStream(op.program, seek, [row_index], tuple(operands))
    streams.run()
    live = [node for node in op.results if node in op.program[Activity].live]
    value = {n: streams.rows(n, axes.row_dim(n)) if axes.has_rows(n) else streams.full(n) for n in live}
    return value, streams.barriers


def law(op: OneOp, operands: Sequence[Tensor], indices: Tensor) -> dict[fx.Node, Tensor]:
    """The definition: the full operation on operands whose other rows are detached, then its selected rows."""
    values = op.values([_only(op.axes, *pair, indices) for pair in zip(op.operands, operands, strict=True)])
    live = [node for node in op.results if node in op.program[Activity].live]
    return {node: _selected(op.axes, node, values[node], indices) for node in live}


def _only(axes: TokenAxes, node: fx.Node, x: Tensor, indices: Tensor) -> Tensor:
    if not x.requires_grad or not axes.has_rows(node):
        return x
    kept = torch.zeros_like(x, dtype=torch.bool)
    kept[rows_index(axes, axes.of(node), axes.row_dim(node), indices)] = True
    return torch.where(kept, x, x.detach())


def _selected(axes: TokenAxes, node: fx.Node, x: Tensor, indices: Tensor) -> Tensor:
    return x[rows_index(axes, axes.of(node), axes.row_dim(node), indices)] if axes.has_rows(node) else x
