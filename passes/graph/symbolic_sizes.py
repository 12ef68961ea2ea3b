"""Sizes that are symbols: where the inputs have them, and how a graph computes with them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp

from .emit import emit


def places_of_symbols(inputs: Sequence[Any]) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """Symbols of sizes and the first place where the inputs have each: the number of an input and its dim (``None``: it is a number)."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for i, value in enumerate(inputs):
        dims = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in dims:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found.setdefault(size.node.expr, (i, dim))
    return found


def canonical_symint(value: Any) -> Any:
    """A symbolic size as the symbol that it is known to equal by now. Inductor reads a number as it was created: where ids and mask have
    lengths of their own that a guard found equal, it would not know the symbol that other sizes are made of."""
    if not isinstance(value, torch.SymInt):
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def symbols_of(sizes: Iterable[Any]) -> list[torch.SymInt]:
    """The symbols that ``sizes`` are made of, each once, in the order of their names."""
    found = {symbol: size for size in sizes for symbol in free_symbols(size)}
    return [found[s].node.shape_env.create_symintnode(s, hint=None) for s in sorted(found, key=str)]


class Numbers:
    """Sizes as arguments of the operations of a graph: those that symbols are part of are computed where it begins.

    ``inputs``: examples of what the graph is called with.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[Any]) -> None:
        self._inputs, self._places = graph.find_nodes(op="placeholder"), places_of_symbols(inputs)
        self._first = next(node for node in graph.nodes if node.op != "placeholder")
        self._known: dict[sympy.Expr, Any] = {}

    def knows(self, symbols: Iterable[torch.SymInt]) -> bool:
        """Whether the inputs have all of these (a size that depends on data is in none)."""
        return all(symbol.node.expr in self._places for symbol in symbols)

    def __call__(self, size: Any) -> Any:
        """A number, or the node that computes it; anything but a symbolic size as it is."""
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        if expr not in self._known:
            with self._first.graph.inserting_before(self._first):
                symbols = {symbol: self._symbol(symbol) for symbol in expr.free_symbols}
                self._known[expr] = sympy_interp(_Emitted(self._inputs[0]), symbols, expr)
        return self._known[expr]

    def emit(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """``emit`` with arguments that may be symbolic sizes."""
        return emit(like, target, *pytree.tree_map(self, args), **kwargs)

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        place, dim = self._places[symbol]
        node = self._inputs[place]
        return node if dim is None else emit(node, torch.ops.aten.sym_size.int, node, dim)


@dataclass(frozen=True)
class _Emitted:
    """The arithmetic of sizes as ``sympy_interp`` calls it, as nodes."""

    like: fx.Node

    def constant(self, value: sympy.Expr, dtype: torch.dtype) -> int:
        return int(value)

    def add(self, a: Any, b: Any) -> fx.Node:
        return emit(self.like, operator.add, a, b)

    def mul(self, a: Any, b: Any) -> fx.Node:
        return emit(self.like, operator.mul, a, b)

    def floordiv(self, a: Any, b: Any) -> fx.Node:
        return emit(self.like, operator.floordiv, a, b)
