"""Mask reader: which attention masks are no more than a comparison of positions, so that no ``[T, T]`` tensor need exist.

A mask is read as what it says of one query and one key: every operation that makes it is evaluated at symbols for the
instance, the head and both positions. ``arange`` and views leave arithmetic, what depends on the batch stays an unknown
function of its own positions. The result, a conjunction, is taken apart: causal, a window, keys that are visible, segments
that are equal. A mask with any other part is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from ..graph.factors import same_size
from ..graph.nodes import bind, is_tensor
from ..graph.registry import Registry
from .conditions import mask_of_condition
from .masks import HEAD, INSTANCE, KEY, QUERY, Hides, Index, Mask, is_constant

aten = torch.ops.aten
Meaning = Any  # a sympy expression; of a mask a boolean one


def read_mask(mask: fx.Node | None) -> Mask | None:
    """What a mask of attention, broadcast to [B, H, T, S], says; ``None``: more than can be said here."""
    if mask is None:
        return Mask()
    if mask.meta["val"].ndim > 4:
        return None
    reader = _Reader()
    meaning = reader.at(mask, _index_of(mask))
    is_bool = mask.meta["val"].dtype is torch.bool
    as_it_is = not meaning.has(QUERY) and (not is_bool or meaning.has(HEAD))
    if is_bool:
        return Mask(added=mask) if as_it_is else mask_of_condition(meaning, reader.nodes)
    shown, hidden = _choice(mask)
    found = None if shown is None else mask_of_condition(reader.at(shown, _index_of(shown)), reader.nodes)
    found = _hiding(found, hidden, mask.meta["val"].dtype, Hides.BY_SUM)
    if found is None and as_it_is:
        never = is_constant(mask) or not _loses_scores(mask.meta["val"].dtype)
        return Mask(added=mask, hides=Hides.WHOLLY if never else Hides.BY_SUM)
    return found


def read_hidden(hidden: fx.Node, value: float, dtype: torch.dtype) -> Mask | None:
    """The mask of scores of a ``dtype`` that are ``value`` where ``hidden``, a bool node, is True."""
    reader = _Reader()
    meaning = sympy.to_nnf(sympy.Not(reader.at(hidden, _index_of(hidden))), simplify=False)
    return _hiding(mask_of_condition(meaning, reader.nodes), value, dtype, Hides.BY_VALUE)


def _hiding(mask: Mask | None, value: float | None, dtype: torch.dtype, hides: Hides) -> Mask | None:
    """``mask``, where it hides keys by ``value``, a number of ``dtype``."""
    if mask is None or not mask.keys:  # every query sees itself
        is_hidden = value is not None and value <= max(torch.finfo(dtype).min, -1e9)
        return mask if is_hidden else None
    is_least = value == torch.finfo(dtype).min and (hides is Hides.BY_VALUE or _loses_scores(dtype))
    return replace(mask, hides=hides) if is_least and not mask.segments else None


def _loses_scores(dtype: torch.dtype) -> bool:
    """Whether a score is lost in a sum with the least number of ``dtype``: in float16 it may reach that."""
    return dtype is not torch.float16


def _choice(mask: fx.Node) -> tuple[fx.Node | None, float | None]:
    """The condition of a mask that is 0 where it is True, and the number that it is elsewhere."""
    if mask.target not in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        return None, None
    operands: Any = mask.args
    shown, seen, hidden = operands[0], *map(_number, operands[1:])
    return (shown, hidden) if seen == 0 else (None, None)


def _number(value: Any) -> float | None:
    """The number that a tensor is filled with."""
    if isinstance(value, (int, float)):
        return value
    if value.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0.0
    filled = value.target in (aten.full.default, aten.scalar_tensor.default, aten.full_like.default)
    number = value.args[0 if value.target is aten.scalar_tensor.default else 1] if filled else None
    return number if isinstance(number, (int, float)) else None


def _index_of(mask: fx.Node) -> Index:
    return _broadcast(mask, (INSTANCE, HEAD, QUERY, KEY)[-mask.meta["val"].ndim :])


class _Reader:
    """Evaluates nodes at symbolic indices. ``nodes``: what its unknown functions stand for."""

    def __init__(self) -> None:
        self.nodes: dict[Any, fx.Node] = {}

    def at(self, node: Any, index: Index) -> Meaning:
        if not is_tensor(node):
            return sympy.sympify(node) if isinstance(node, (bool, int, float)) else None
        rule = _RULES.get(node.target)
        found = rule(self, node, _broadcast(node, index)) if rule is not None else None
        return self._unknown(node, index) if found is None else found

    def operand(self, node: Any, index: Index) -> Meaning:
        """An operand that is broadcast to a result that is read at ``index``."""
        rank = node.meta["val"].ndim if is_tensor(node) else 0
        return self.at(node, _broadcast(node, index[len(index) - rank :]) if rank else ())

    def _unknown(self, node: fx.Node, index: Index) -> Meaning:
        kind = {"integer": True} if not node.meta["val"].dtype.is_floating_point else {"real": True}
        function = sympy.Function(node.name, **kind)
        if node.meta["val"].dtype is torch.bool:
            function = type(node.name, (_Condition,), {})
        function = next((f for f, other in self.nodes.items() if other is node), function)
        self.nodes[function] = node
        return function(*_broadcast(node, index))


class _Condition(sympy.Function, Boolean):
    """An unknown function whose value is True or False."""


def _broadcast(node: fx.Node, index: Index) -> Index:
    """``index`` with 0 for dims of size 1."""
    shape = node.meta["val"].shape
    return tuple(sympy.S.Zero if same_size(size, 1) else i for i, size in zip(index, shape, strict=True))


Rule = Callable[[_Reader, fx.Node, Index], Meaning]
_RULES: Registry[Rule] = Registry("mask rule")


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.register(targets, rule)
        return rule

    return register


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    given = bind(node)
    start, step = given.get("start", 0), given.get("step", 1)
    return start + step * index[0] if isinstance(start, int) and isinstance(step, int) else None


@_rule(aten.unsqueeze.default)
def _unsqueeze(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    dim = bind(node)["dim"] % len(index)
    return reader.at(node.args[0], (*index[:dim], *index[dim + 1 :]))


@_rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dim, aten.squeeze.default)
def _regroup(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    """A view that only adds or removes dims of size 1."""
    source = node.args[0].meta["val"].shape
    kept = [i for i, size in zip(index, node.meta["val"].shape, strict=True) if not same_size(size, 1)]
    sizes = [size for size in node.meta["val"].shape if not same_size(size, 1)]
    wanted = [size for size in source if not same_size(size, 1)]
    if len(sizes) != len(wanted) or not all(map(same_size, sizes, wanted)):
        return None
    rest = iter(kept)
    return reader.at(node.args[0], tuple(sympy.S.Zero if same_size(size, 1) else next(rest) for size in source))


@_rule(aten.expand.default)
def _expand(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    return reader.operand(node.args[0], index)


@_rule(aten.repeat.default)
def _repeat(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    """Repeated along dims of size 1 alone, it is an expansion."""
    source = node.args[0].meta["val"].shape
    sizes = node.meta["val"].shape[len(index) - len(source) :]
    same = all(same_size(size, 1) or same_size(size, whole) for size, whole in zip(source, sizes, strict=True))
    return reader.operand(node.args[0], index) if same else None


@_rule(aten.slice.Tensor)
def _slice(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    given = bind(node)
    dim, start, step = given["dim"] % len(index), given["start"] or 0, given["step"]
    if not isinstance(start, int) or start < 0:
        return None
    return reader.at(node.args[0], (*index[:dim], start + step * index[dim], *index[dim + 1 :]))


@_rule(aten.index.Tensor)
def _index(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    """A position that is not known to be at least 0 may count from the end."""
    given = bind(node)
    source, places = given["self"], given["indices"]
    if any(place is None or place.meta["val"].dtype is torch.bool for place in places):
        return None
    at = tuple(reader.operand(place, index) for place in places)
    whole = len(at) == source.meta["val"].ndim
    return reader.at(source, at) if whole and all(i.is_nonnegative for i in at) else None


@_rule(aten.new_ones.default, aten.ones.default, aten.ones_like.default)
def _ones(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    return sympy.true if node.meta["val"].dtype is torch.bool else sympy.S.One


@_rule(
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
)
def _same(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    """A copy; as a bool, what is 0 where a condition holds and another number elsewhere."""
    source, after = node.args[0], node.meta["val"].dtype
    before = source.meta["val"].dtype
    if after is torch.bool and before.is_floating_point:
        shown, hidden = _choice(source)
        return sympy.Not(reader.operand(shown, index)) if shown is not None and hidden else None
    is_same = before is after or (not before.is_floating_point and torch.bool not in (before, after))
    return reader.at(source, index) if is_same else None


@_rule(aten.diff.default)
def _diff(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    """x[i] - x[i-1], and at 0 the difference to what is put before: known where both are the same number."""
    given = bind(node)
    source, before, dim = given["self"], given["prepend"], given["dim"] % len(index)
    one_before = is_tensor(before) and same_size(before.meta["val"].shape[dim], 1)
    if given["n"] != 1 or given["append"] is not None or not one_before:
        return None

    def place(position: Any) -> Index:
        return (*index[:dim], position, *index[dim + 1 :])

    inside = sympy.expand(reader.at(source, index) - reader.at(source, place(index[dim] - 1)))
    first = sympy.expand(reader.at(source, place(sympy.S.Zero)) - reader.operand(before, place(sympy.S.Zero)))
    return inside if inside == first and inside.is_number else None


@_rule(aten.cumsum.default)
def _cumsum(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
    """A sum of nothing but 0."""
    return sympy.S.Zero if reader.at(node.args[0], index) in (sympy.S.Zero, sympy.false) else None


def _elementwise(function: Callable[..., Meaning], *targets: Any, booleans: bool = False) -> None:
    def rule(reader: _Reader, node: fx.Node, index: Index) -> Meaning:
        operands: Sequence[Any] = node.args[:2] if len(node.args) > 1 else node.args
        kinds = [arg.meta["val"].dtype is torch.bool for arg in operands if is_tensor(arg)]
        meanings = [reader.operand(arg, index) for arg in operands]
        if node.kwargs.get("alpha", 1) != 1 or None in meanings or any(kind is not booleans for kind in kinds):
            return None
        return function(*meanings)

    _rule(*targets)(rule)


_elementwise(sympy.Add, aten.add.Tensor, aten.add.Scalar)
_elementwise(lambda x, y: x - y, aten.sub.Tensor, aten.sub.Scalar)
_elementwise(sympy.Abs, aten.abs.default)
_elementwise(sympy.Le, aten.le.Tensor, aten.le.Scalar)
_elementwise(sympy.Lt, aten.lt.Tensor, aten.lt.Scalar)
_elementwise(sympy.Ge, aten.ge.Tensor, aten.ge.Scalar)
_elementwise(sympy.Gt, aten.gt.Tensor, aten.gt.Scalar)
_elementwise(sympy.Eq, aten.eq.Tensor, aten.eq.Scalar)
_elementwise(sympy.Ne, aten.ne.Tensor, aten.ne.Scalar)
_elementwise(sympy.And, aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, booleans=True)
_elementwise(sympy.Or, aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, booleans=True)
_elementwise(sympy.Not, aten.bitwise_not.default, aten.logical_not.default, booleans=True)
