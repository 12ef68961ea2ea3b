"""Axes rules: how the axes of operands become the axes of results.

An axes rule is a function ``rule(op) -> Flow``; ``Op`` has the axes of the operands. Most operations belong to a family
(``passes/rules/axes.py``) and need one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..graph.factors import Axes, Dim, Space, same_size
from ..graph.nodes import bind, operands_of, tensors_in
from ..graph.registry import Registry

#: Result dim -> operand dim, for dims along which a row of the result depends only on the same row of the operand.
Carry = dict[int, int]


@dataclass(frozen=True)
class Flow:
    """How axes flow through one operation.

    Args:
        outputs: the axes of each tensor result.
        carries: one ``Carry`` per tensor operand, in the order of ``op.operands``. A result dim that an operand does
            not carry is broadcast from that operand, or mixed by the operation.
        regrouped: True for a view: dims correspond by the position of their factors instead of by ``carries``.
        unknown: True for an operation without a rule.
    """

    outputs: tuple[Axes, ...]
    carries: tuple[Carry, ...] = ()
    regrouped: bool = False
    unknown: bool = False


AxesRule = Callable[["Op"], Flow]
AXES_RULES: Registry[AxesRule] = Registry("axes rule")


def axes_rule(*targets: Any, rule: AxesRule | None = None) -> Any:
    """Register an axes rule, as a decorator or as ``axes_rule(op, rule=formula("... i, o i -> ... o"))``.

    Args:
        targets: operations; one of a library that may not be imported by its name ``"library::operation"``.
        rule: ``rule(op) -> Flow``; ``None``: the decorated function.

    Raises:
        ValueError: a target has an axes rule already.
    """

    def register(function: AxesRule) -> AxesRule:
        AXES_RULES.register(targets, function)
        return function

    return register(rule) if rule is not None else register


class Op:
    """One operation with the axes of its operands. Its methods are the families of rules."""

    def __init__(self, node: fx.Node, space: Space, axes: dict[fx.Node, tuple[Axes, ...]]) -> None:
        self.node, self.space, self._axes = node, space, axes
        self.arguments = bind(node)
        self.operands = operands_of(node)
        self.results = tensors_in(node.meta.get("val"))

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def axes(self, node: fx.Node) -> Axes:
        return self._axes[node][0]

    def dims(self, name: str, rank: int | None = None) -> list[int]:
        """An argument that names dims (``None`` and ``[]``: all dims), as non-negative numbers."""
        rank = self.operands[0].meta["val"].ndim if rank is None else rank
        dims = self[name]
        dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        return [dim % rank if rank else 0 for dim in dims]

    # -- families -----------------------------------------------------------------------------------------------------

    def unknown(self) -> Flow:
        """Nothing is known: fresh axes, every dim mixed."""
        outputs = tuple(self.space.fresh_axes(out.shape) for out in self.results)
        return Flow(outputs, tuple({} for _ in self.operands), unknown=True)

    def elementwise(self, operands: Sequence[fx.Node] | None = None) -> Flow:
        """Operands broadcast from the right; every dim is carried. Only ``operands`` count, if given."""
        shape = self.results[0].shape
        dims: list[Dim] = [()] * len(shape)
        carries: list[Carry] = []
        for node in self.operands:
            axes, carry = self.axes(node), {}
            for dim, label in enumerate(axes) if operands is None or node in operands else ():
                out = dim + len(shape) - len(axes)
                if same_size(node.meta["val"].shape[dim], shape[out]):
                    carry[out] = dim
                    dims[out] = self.join(dims[out], label)
            carries.append(carry)
        outputs = tuple(tuple(dims) for _ in self.results)
        return Flow(outputs, tuple(carries))

    def along(self, mixed: Iterable[int], keep_labels: bool = False) -> Flow:
        """One main operand, a result of the same rank; ``mixed`` dims are not carried.

        They get new labels unless ``keep_labels``.
        """
        axes, mixed = self.axes(self.operands[0]), set(mixed)
        outputs = tuple(
            tuple(
                label if dim not in mixed or keep_labels else self.space.fresh_part(size, label)
                for dim, (label, size) in enumerate(zip(axes, out.shape, strict=True))
            )
            for out in self.results
        )
        return self._main(outputs, {dim: dim for dim in range(len(axes)) if dim not in mixed})

    def mixing(self, dims: Iterable[int]) -> Flow:
        """One main operand, a result of the same rank; each position in ``dims`` combines several of the operand."""
        axes, dims = self.axes(self.operands[0]), set(dims)
        outputs = tuple(
            tuple(self.space.fresh_mixture(out.shape[i]) if i in dims else label for i, label in enumerate(axes))
            for out in self.results
        )
        return self._main(outputs, {dim: dim for dim in range(len(axes)) if dim not in dims})

    def reduce(self, dims: Iterable[int], keepdim: bool = False) -> Flow:
        """One main operand whose ``dims`` are removed (``keepdim``: become 1)."""
        axes, dims = self.axes(self.operands[0]), set(dims)
        kept = [dim for dim in range(len(axes)) if keepdim or dim not in dims]
        outputs = tuple(tuple(() if dim in dims else axes[dim] for dim in kept) for _ in self.results)
        return self._main(outputs, {out: dim for out, dim in enumerate(kept) if dim not in dims})

    def permute(self, order: Sequence[int | None]) -> Flow:
        """Dim ``i`` of the result is dim ``order[i]`` of the operand (``None``: a new dim)."""
        axes, shape = self.axes(self.operands[0]), self.results[0].shape
        out = tuple(self.space.fresh(shape[i]) if dim is None else axes[dim] for i, dim in enumerate(order))
        return self._main((out,) * len(self.results), {i: dim for i, dim in enumerate(order) if dim is not None})

    def regroup(self) -> Flow:
        """A view: factors keep their order and are regrouped into dims."""
        out = self.space.regroup(self.axes(self.operands[0]), self.results[0].shape)
        return Flow((out,), ({},) * len(self.operands), regrouped=True)

    def formula(self, spec: str) -> Flow:
        """An einsum-like formula over the tensor operands in order, e.g. ``"... i, o i, o -> ... o"`` for linear.

        A letter of the result that an operand has is carried; letters that are not in the result are contracted;
        ``...`` broadcasts. Terms beyond the operands present (a missing bias) are ignored.
        """
        left, right = (side.strip() for side in spec.split("->"))
        terms = [term.split() for term in left.split(",")][: len(self.operands)]
        out_term, shape = right.split(), self.results[0].shape
        bound: dict[str, Dim] = {}
        carries: list[Carry] = []
        out_letters = self._letters(out_term, len(shape))
        for node, term in zip(self.operands, terms, strict=False):
            axes, sizes = self.axes(node), node.meta["val"].shape
            letters = self._letters(term, len(axes))
            for letter, label, size in zip(letters, axes, sizes, strict=True):
                if not (letter.startswith("...") and same_size(size, 1)):
                    bound[letter] = self.join(bound.get(letter, ()), label)
            carries.append({out_letters.index(c): dim for dim, c in enumerate(letters) if c in out_letters})
        out = tuple(bound[c] if c in bound else self.space.fresh(s) for c, s in zip(out_letters, shape, strict=True))
        return Flow((out,) * len(self.results), tuple(self._without_broadcast(carries, shape)))

    # -- helpers ------------------------------------------------------------------------------------------------------

    def join(self, left: Dim, right: Dim) -> Dim:
        """The label of a dim that has both labels: they are the same axis."""
        if left and right:
            self.space.equate(left, right)
        return left or right

    def _main(self, outputs: tuple[Axes, ...], carry: Carry) -> Flow:
        return Flow(outputs, (carry, *({} for _ in self.operands[1:])))

    @staticmethod
    def _letters(term: list[str], rank: int) -> list[str]:
        """Replace ``...`` by one letter per dim, numbered from the right so that operands align."""
        if "..." not in term:
            return term
        at, n = term.index("..."), rank - len(term) + 1
        return term[:at] + [f"...{n - i}" for i in range(n)] + term[at + 1 :]

    def _without_broadcast(self, carries: list[Carry], shape: Sequence) -> Iterable[Carry]:
        for node, carry in zip(self.operands, carries, strict=False):
            sizes = node.meta["val"].shape
            yield {out: dim for out, dim in carry.items() if same_size(sizes[dim], shape[out])}
