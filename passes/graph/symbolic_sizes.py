"""Symbolic sizes: where the inputs have them, and how a graph computes with them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .emit import emit

#: (position of an input, dim); the dim is ``None`` if the input is a number.
Place = tuple[int, int | None]


def places_of_symbols(inputs: Sequence[Any]) -> dict[sympy.Symbol, Place]:
    """The symbols of sizes, each with the first place where the inputs have it."""
    found: dict[sympy.Symbol, Place] = {}
    for i, value in enumerate(inputs):
        dims = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in dims:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found.setdefault(size.node.expr, (i, dim))
    return found


def computed(size: Any, places: Mapping[sympy.Symbol, Place]) -> Callable[[Sequence[Any]], int] | None:
    """A function that computes ``size`` from the inputs of a call; ``None`` if the inputs lack a symbol of it."""
    if not isinstance(size, torch.SymInt):
        return lambda args: size
    expr = size.node.expr
    if not expr.free_symbols <= places.keys():
        return None
    read = {symbol: places[symbol] for symbol in expr.free_symbols}

    def compute(args: Sequence[Any]) -> int:
        sizes = {symbol: args[i] if dim is None else args[i].shape[dim] for symbol, (i, dim) in read.items()}
        return sympy_interp(PythonReferenceAnalysis, sizes, expr)

    return compute


def canonical_symint(value: Any) -> Any:
    """A symbolic size in terms of the symbol that it is now known to equal; anything else unchanged.

    Inductor reads the expression that a SymInt was created with. If ids and mask have their own lengths and a guard
    found them equal, it would not know the symbol that the other sizes are made of.
    """
    if not isinstance(value, torch.SymInt):
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def symbols_of(sizes: Iterable[Any]) -> list[torch.SymInt]:
    """The distinct symbols in ``sizes``, sorted by name."""
    found = {symbol: size for size in sizes for symbol in free_symbols(size)}
    return [found[s].node.shape_env.create_symintnode(s, hint=None) for s in sorted(found, key=str)]


class Numbers:
    """Symbolic sizes as arguments of a graph's operations, computed at the start of the graph.

    Args:
        graph: the graph; nodes are added to it.
        inputs: example inputs of the graph.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[Any]) -> None:
        self._graph, self._inputs = graph, graph.find_nodes(op="placeholder")
        self._places = places_of_symbols(inputs)
        self._known: dict[sympy.Expr, Any] = {}

    def knows(self, symbols: Iterable[torch.SymInt]) -> bool:
        """True if the inputs have all of these symbols (a data-dependent size is in no input)."""
        return all(symbol.node.expr in self._places for symbol in symbols)

    def __call__(self, size: Any) -> Any:
        """The number, or the node that computes a symbolic size; anything else unchanged."""
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        if expr not in self._known:
            with self._graph.inserting_before(next(node for node in self._graph.nodes if node.op != "placeholder")):
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
    """The arithmetic of sizes that ``sympy_interp`` calls, as nodes."""

    like: fx.Node

    def constant(self, value: sympy.Expr, dtype: torch.dtype) -> int:
        return int(value)

    def add(self, a: Any, b: Any) -> fx.Node:
        return emit(self.like, operator.add, a, b)

    def mul(self, a: Any, b: Any) -> fx.Node:
        return emit(self.like, operator.mul, a, b)

    def floordiv(self, a: Any, b: Any) -> fx.Node:
        return emit(self.like, operator.floordiv, a, b)
