"""Routing: regions that sort the rows of tokens (for example by expert) and return every result to its row.

Sorting mixes tokens, but each returned row depends only on its own row. A region is proved to be of this form by
following the order from the sort on. Along the sorted axis S every value has one of these roles:

- *keys*, the sorted keys, or *order*: for each position of S the row that is there (divided by k, the token of the row,
  if every token has k rows);
- *sorted*: row s depends only on the row that the order names. Such values come from indexing rows by the order, and
  from operations that work on S row by row, including a grouped product with the ends of the groups of keys;
- *places*: for each row its position in S. Sorted values indexed by the places are rows again: the exit of the region.

If every value computed from the sort has a role, the region runs on any subset of rows as on all. Otherwise it stays a
barrier.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph.factors import Dim, same_size
from ..graph.nodes import bind, is_tensor, operands_of
from ..graph.op_sets import CASTS, VIEWS
from ..graph.program import Program
from .token_axes import TokenAxes

aten = torch.ops.aten
_SORTS = (aten.sort.default, aten.sort.stable)
_SAME = (*CASTS, aten.detach.default)
_REGROUPED = (*VIEWS, aten.flatten.using_ints)
_BLANKS = (aten.empty_like.default, aten.zeros_like.default)
#: Grouped products: the names of the operand with the rows and of that with the ends of the groups.
GROUPED = {"aten::_grouped_mm": ("self", "offs"), "transformers::grouped_mm_fallback": ("input", "offs")}


@dataclass(frozen=True)
class Route:
    """A region that can run on the kept rows alone: its nodes, and the exits, where values are in row order again."""

    nodes: frozenset[fx.Node]
    exits: frozenset[fx.Node]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors that the region reads."""
        read = dict.fromkeys(x for node in self.nodes for x in node.all_input_nodes if is_tensor(x))
        return tuple(sorted(x for x in read if x not in self.nodes))


@dataclass(frozen=True)
class Routes:
    """The proved routes of a graph, in order."""

    found: tuple[Route, ...] = ()

    def to(self, node: fx.Node) -> Route | None:
        """The route with the exit ``node``."""
        return next((route for route in self.found if node in route.exits), None)

    def by_node(self, exits: Collection[fx.Node]) -> dict[fx.Node, Route]:
        """The nodes of the routes that end in any of ``exits``, each with its route."""
        return {node: route for route in self.found if not route.exits.isdisjoint(exits) for node in route.nodes}


@dataclass(frozen=True)
class FindRoutes:
    """Find the regions that sort rows and return them to their places.

    Reads ``TokenAxes``; writes ``Routes``.
    """

    name: str = "routing"

    def run(self, program: Program) -> Program:
        axes, sorts = program[TokenAxes], (node for node in program.graph.nodes if node.target in _SORTS)
        return program.with_(Routes(tuple(route for node in sorts for route in _route(node, axes))))

    def check(self, program: Program) -> None:
        """Nothing to verify: a region without a proof is a barrier."""


@dataclass
class _Proof:
    """The roles of the nodes that are computed from a sort.

    Args:
        axes: the axes of the graph.
        sort: the sort.
        rows: the axis that is sorted.
        sorted_axis: the axis of the result.
        roles: the role of each value.
    """

    axes: TokenAxes
    sort: fx.Node
    rows: Dim
    sorted_axis: Dim
    roles: dict[fx.Node, str] = field(default_factory=dict)

    def role_of(self, node: fx.Node) -> str | None:
        """The role of a node, given those of its operands; ``None`` if it has none."""
        roles = [self.roles.get(arg) for arg in node.all_input_nodes]
        rules = (
            self._part_of_sort,
            self._cast,
            self._token_of,
            self._indexed,
            self._groups,
            self._placed,
            self._by_row,
        )
        return next((role for rule in rules if (role := rule(node, roles))), None)

    def _part_of_sort(self, node: fx.Node, roles: list) -> str | None:
        return ("keys", "order")[node.args[1]] if node.args and node.args[0] is self.sort else None

    def _cast(self, node: fx.Node, roles: list) -> str | None:
        if node.target in _BLANKS and roles[0] == "order":
            return "blank"
        return roles[0] if node.target in _SAME and roles[0] != "sorted" else None

    def _token_of(self, node: fx.Node, roles: list) -> str | None:
        """``order // k``, where every token has k rows."""
        given = bind(node)
        by = given.get("other")
        rounds = node.target is aten.floor_divide.default or given.get("rounding_mode") == "floor"
        if not (rounds and roles == ["order"] and isinstance(by, int) and self.rows):
            return None
        return f"order // {by}"

    def _indexed(self, node: fx.Node, roles: list) -> str | None:
        if node.target is not aten.index.Tensor or len(node.args[1]) != 1:
            return None
        source, where = node.args[0], self.roles.get(node.args[1][0])
        labels = self.axes.of(source)
        if where == "places" and self.roles.get(source) == "sorted":
            return "out"
        if where == "keys" and source not in self.roles and not self._has_tokens(source):
            return "sorted"
        if source in self.roles or where is None or not where.startswith("order"):
            return None
        by = int(where.removeprefix("order").removeprefix(" // ") or 1)
        rows = self.rows if by == 1 else self._without_last(by)
        return "sorted" if rows and labels[0] == rows and not self._has_tokens(source, start=1) else None

    def _groups(self, node: fx.Node, roles: list) -> str | None:
        if roles == ["keys"] and self._counts_every_key(node):
            return "counts"
        if node.target is aten.cumsum.default and roles == ["counts"]:
            return "ends"
        names = GROUPED.get(node.target.name()) if isinstance(node.target, torch._ops.OpOverload) else None
        if names is None:
            return None
        rows, ends = (self.roles.get(bind(node)[name]) for name in names)
        weights = [arg for arg in node.all_input_nodes if arg not in self.roles]
        grouped = (rows, ends) == ("sorted", "ends") and not any(map(self._has_tokens, weights))
        return "sorted" if grouped else None

    def _counts_every_key(self, node: fx.Node) -> bool:
        """True for counts of the keys 0, 1, 2, ... where the keys are the indices of a top-k or argmax.

        A negative key would shift all groups; indices can't be negative.
        """
        given = bind(node)
        whole = node.target is aten.histc.default and given["min"] == 0 and given["max"] == given["bins"] - 1
        return (whole or node.target is aten.bincount.default) and _are_positions(self.sort.args[0])

    def _placed(self, node: fx.Node, roles: list) -> str | None:
        """``blank[order] = arange``: the places."""
        if node.target is not aten.index_put.default or roles[:2] != ["blank", "order"]:
            return None
        numbers = node.args[2]
        counts = numbers.target is aten.arange.default and self._is_sorted_size(numbers.args[0])
        return "places" if counts and len(node.args) == 3 else None

    def _by_row(self, node: fx.Node, roles: list) -> str | None:
        """Row-wise operations on sorted rows: the sorted axis is carried from every operand that has it."""
        if not is_tensor(node) and not isinstance(node.meta.get("val"), (tuple, list)):
            return None
        if {*roles} - {"sorted", None} or "sorted" not in roles:
            return None
        labels = self.axes.of(node)
        dims = [i for i, label in enumerate(labels) if label == self._sorted_axis]
        if len(dims) != 1:
            return None
        for i, arg in enumerate(operands_of(node)):
            known = self.roles.get(arg) == "sorted"
            if not known and self._has_tokens(arg):
                return None
            if known and self.axes.carried(node, i, dims[0]) is None:
                return None
        return "sorted"

    @property
    def _sorted_axis(self) -> Dim:
        return self.axes.space.resolve(self.sorted_axis)

    def _has_tokens(self, node: fx.Node, start: int = 0) -> bool:
        return any(self.axes.axis_at(label) is not None for label in self.axes.of(node)[start:])

    def _is_sorted_size(self, size: Any) -> bool:
        size = size.meta["val"] if isinstance(size, fx.Node) else size
        return same_size(size, self.axes.space.size(self.rows))

    def _without_last(self, by: int) -> Dim | None:
        """The rows' axis without its innermost factors of size ``by``: the axis of the tokens."""
        inner = [n for n in range(1, len(self.rows)) if same_size(self.axes.space.size(self.rows[n:]), by)]
        return self.rows[: inner[0]] if inner else None


def _are_positions(node: Any) -> bool:
    """True for the indices of a top-k or an argmax."""
    while node.target in (*_SAME, *_REGROUPED):
        node = node.args[0]
    of_topk = node.target is operator.getitem and node.args[0].target is aten.topk.default and node.args[1] == 1
    return of_topk or node.target is aten.argmax.default


def _in_order(axes: TokenAxes, rows: Dim, out: Dim) -> bool:
    """True if the returned value has the tokens in the order of the rows before the sort."""
    axis = axes.axis_at(rows)
    assert axis is not None
    last = max(i for i, factor in enumerate(rows) if factor in (*axis.token, *axis.batch))
    return out[: last + 1] == rows[: last + 1]


def _route(sort: fx.Node, axes: TokenAxes) -> Iterator[Route]:
    """The region computed from a sort of the rows of tokens, if it is proved."""
    (label, *rest) = axes.of(sort.args[0])
    order = next((user for user in sort.users if user.args[1] == 1), None)
    if rest or order is None or axes.axis_at(label) is None:
        return
    proof = _Proof(axes, sort, label, axes.of(order)[0])
    region, exits = {sort}, set()
    for node in sort.graph.nodes:
        if node is sort or not region.intersection(node.all_input_nodes):
            continue
        role = proof.role_of(node)
        if role is None or (role == "out" and not _in_order(axes, label, axes.of(node)[0])):
            return
        if role == "out":
            exits.add(node)
        else:
            proof.roles[node] = role
            region.add(node)
    numbers = {node.all_input_nodes[-1] for node in region if node.target is aten.index_put.default}
    yield Route(frozenset({*region, *exits, *numbers}), frozenset(exits))
