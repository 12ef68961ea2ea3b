"""Following dims: the dim of a result that carries a dim of an operand, row by row."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import fx

from ..graph.factors import Axes, Space
from ..graph.nodes import operands_of


class ValueAxes(Protocol):
    """The axes of every value, as ``TokenAxes`` has them."""

    @property
    def space(self) -> Space: ...

    @property
    def axes(self) -> Mapping[fx.Node, tuple[Axes, ...]]: ...

    def of(self, node: fx.Node) -> Axes:
        """The axes of a value in root factors."""
        ...

    def carried(self, node: fx.Node, operand: int, dim: int) -> int | None:
        """The dim of an operand that is carried, row by row, to dim ``dim`` of the result, if there is one."""
        ...

    def token_dims(self, node: fx.Node) -> list[int]:
        """The dims of a value that have a token axis."""
        ...


def uses(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """The operations that read a value, with the number of the operand."""
    for user in node.users:
        if user.target is operator.getitem:
            yield user, 0
        elif user.op == "call_function":
            yield from ((user, i) for i, operand in enumerate(operands_of(user)) if operand is node)


def carried_dims(node: fx.Node, operand: int, found: ValueAxes) -> dict[int, int]:
    """The dims of the result that carry a dim of an operand, and that dim."""
    dims = range(len(found.axes[node][0]))
    return {to: at for to in dims if (at := found.carried(node, operand, to)) is not None}


def carried_to(node: fx.Node, operand: int, dim: int, found: ValueAxes) -> int | None:
    """The dim of the result to which dim ``dim`` of an operand is carried."""
    if node.target is operator.getitem:
        return dim
    return next((to for to, at in carried_dims(node, operand, found).items() if at == dim), None)


def carried_from(node: fx.Node, source: fx.Node, dim: int, found: ValueAxes) -> int | None:
    """The dim of an operand that is carried to dim ``dim`` of the result."""
    if node.target is operator.getitem:
        return dim
    places = (i for i, operand in enumerate(operands_of(node)) if operand is source)
    return next((at for i in places if (at := found.carried(node, i, dim)) is not None), None)
