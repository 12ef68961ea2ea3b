"""Unshift labels: rewrite a loss over a slice of the tokens as the same loss over all tokens.

``cross_entropy(logits[:, a:b], labels)`` equals ``cross_entropy(logits, padded labels)`` if positions outside the slice
are ignored. So the logits of a hand-written next-token loss keep the token axis, as in transformers. A slice of the
head's input is moved in the same way if it has at least half of the tokens (a prefix is cut off); then the head runs
for all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graph.copies import copied
from ..graph.emit import emit
from ..graph.factors import Space, guarded_same_size, same_size
from ..graph.nodes import bind, hint, is_random, operands_of
from ..graph.op_sets import CONVERSIONS, COPIES, LABEL_LOSSES, NONE, VIEWS
from ..graph.program import Program
from ..graph.symbolic_sizes import Numbers, symbols_of

aten = torch.ops.aten
_PERMUTES = (aten.transpose.int, aten.permute.default, aten.t.default)
#: Operations that keep all values.
_MOVES = (*VIEWS, *_PERMUTES, *COPIES)
#: Operations on a whole dim that is their second argument, that of the classes.
_BY_DIM = (aten.slice.Tensor, aten.log_softmax.int)
#: Operations on the whole last dim.
_BY_LAST_DIM = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
_BY_CLASS = (*_BY_DIM, *_BY_LAST_DIM)


@dataclass(frozen=True)
class UnshiftLabels:
    """Move a slice of the token axis from the logits of a loss to its labels.

    Reads and writes ``module``.
    """

    name: str = "unshift labels"

    def run(self, program: Program) -> Program:
        module, _ = copied(program.module)
        number = Numbers(module.graph, program.inputs)
        losses = [node for node in module.graph.nodes if node.target in LABEL_LOSSES]
        unshifted = [_unshift(node, number) for node in losses]
        if not any(unshifted):
            return program
        module.graph.eliminate_dead_code()
        module.recompile()
        return replace(program, module=module)

    def check(self, program: Program) -> None:
        program.graph.lint()


@dataclass(frozen=True)
class _Cut:
    """A slice of the tokens on the way from a head to a loss.

    Args:
        node: the slice.
        steps: the operations behind it that change values or classes, in order.
        rows: the dims of the slice that are not the classes, in the order in which the labels have them.
        classes: the dim of the slice that becomes the classes of the loss.
    """

    node: fx.Node
    steps: tuple[fx.Node, ...]
    rows: tuple[int, ...]
    classes: int

    @property
    def dim(self) -> int:
        return bind(self.node)["dim"] % self.node.meta["val"].ndim


def _unshift(loss: fx.Node, number: Numbers) -> bool:
    """Move every slice of the tokens from the logits of ``loss`` to its labels; True if there is one."""
    given = bind(loss)
    if given["self"].meta["val"].ndim < 2 or given["target"].meta["val"].is_floating_point():
        return False
    cut = _find_cut(given["self"])
    if cut is None or not number.knows(symbols_of(cut.node.meta["val"].shape)):
        return False
    with loss.graph.inserting_before(loss):
        new = {given["target"]: _padded_labels(loss, cut, number), given["self"]: _whole_logits(loss, cut, number)}
        whole = _repeated(loss, loss.args, new)
        loss.replace_all_uses_with(whole if given["reduction"] != NONE else _of_slice(loss, whole, cut, number))
    loss.graph.erase_node(loss)
    _unshift(whole, number)
    return True


def _of_slice(loss: fx.Node, whole: fx.Node, cut: _Cut, number: Numbers) -> fx.Node:
    """The losses of the tokens in the slice, in the shape of ``loss``, from those of all tokens [N]."""
    shape, at, (start, _) = cut.node.args[0].meta["val"].shape, cut.rows.index(cut.dim), _outside(cut)
    losses = number.emit(loss, aten.reshape.default, whole, [shape[dim] for dim in cut.rows])
    end = start + cut.node.meta["val"].shape[cut.dim]
    losses = number.emit(loss, aten.slice.Tensor, losses, at, start, end)
    return number.emit(loss, aten.reshape.default, losses, [*loss.meta["val"].shape])


def _padded_labels(loss: fx.Node, cut: _Cut, number: Numbers) -> fx.Node:
    """The labels of all tokens, [N]: those outside the slice are ignored."""
    given, shape = bind(loss), cut.node.meta["val"].shape
    labels = number.emit(loss, aten.reshape.default, given["target"], [shape[dim] for dim in cut.rows])
    amounts = [0, 0] * (len(cut.rows) - 1 - cut.rows.index(cut.dim)) + _outside(cut)  # from the last dim on
    padded = number.emit(loss, aten.constant_pad_nd.default, labels, amounts, given["ignore_index"])
    return emit(loss, aten.reshape.default, padded, [-1])


def _whole_logits(loss: fx.Node, cut: _Cut, number: Numbers) -> fx.Node:
    """The logits of all tokens, [N, C]."""
    whole: Any = cut.node.args[0]
    for step in cut.steps:
        by_dim = step.target in _BY_DIM
        args = (step.args[0], cut.classes, *step.args[2:]) if by_dim else step.args
        whole = _repeated(step, args, {_source(step): whole})
    order = [*cut.rows, cut.classes]
    whole = whole if order == sorted(order) else emit(loss, aten.permute.default, whole, order)
    return number.emit(loss, aten.reshape.default, whole, [-1, whole.meta["val"].shape[-1]])


def _repeated(step: fx.Node, args: tuple[Any, ...], new: Mapping[Any, fx.Node]) -> fx.Node:
    """``step`` in its place with ``args`` in which nodes are replaced; its dtype may be that of an autocast region."""
    args, kwargs = fx.map_arg((args, step.kwargs), lambda node: new.get(node, node))
    with step.graph.inserting_before(step):
        node = emit(step, step.target, *args, **kwargs)
    node.meta["val"] = node.meta["val"].to(step.meta["val"].dtype)
    return node


def _outside(cut: _Cut) -> list[Any]:
    """The numbers of tokens before and after the slice."""
    whole, part = (node.meta["val"].shape[cut.dim] for node in (cut.node.args[0], cut.node))
    start = bind(cut.node)["start"] or 0
    start = start.meta["val"] if isinstance(start, fx.Node) else start
    start = max(start + whole, 0) if start < 0 else start
    return [start, whole - part - start]


def _find_cut(logits: fx.Node) -> _Cut | None:
    """The last slice of the tokens on the way to the logits of a loss; ``None`` if there is none."""
    node, behind = logits, list[fx.Node]()
    while (source := _source(node)) is not None:
        if node.target is aten.slice.Tensor and (cut := _read(node, behind)):
            return cut
        behind.insert(0, node)
        node = source
    return None


def _source(node: fx.Node) -> fx.Node | None:
    """The operand of an operation that moves values, or processes each of them or its classes alone, else ``None``."""
    if node.target in _BY_LAST_DIM:
        return node.args[0] if all(x.op == "placeholder" for x in operands_of(node)[1:]) else None  # type: ignore
    operands = {x for x in operands_of(node) if x.meta["val"].ndim}
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and not is_random(node)
    known = is_pointwise or node.target in (*_MOVES, *_BY_CLASS, *CONVERSIONS)
    return operands.pop() if known and len(operands) == 1 else None


def _read(node: fx.Node, behind: Sequence[fx.Node]) -> _Cut | None:
    """The slice ``node``; ``None`` if it cuts the classes, or the operations ``behind`` it are not by token."""
    way = _Way(node.meta["val"].shape)
    if not all(map(way.follow, behind)) or (found := way.rows_and_classes()) is None:
        return None
    cut = _Cut(node, tuple(step for step in behind if step.target not in _MOVES), *found)
    whole, part = (x.meta["val"].shape for x in (node.args[0], node))
    size = part[cut.dim]
    known = bind(node)["step"] == 1 and not same_size(size, 0) and not guarded_same_size(size, 1)
    if any(step.target in _BY_LAST_DIM for step in cut.steps):
        known = known and cut.classes == len(part) - 1 and 2 * hint(size) >= hint(whole[cut.dim])
    return cut if known and cut.dim != cut.classes else None


class _Way:
    """The axes of a value on the way from a slice to a loss.

    ``own`` has the axis of every dim of the slice, ``axes`` those of the value. ``by_class``: the dims of the slice
    that operations on the way process as a whole.
    """

    def __init__(self, shape: Sequence[Any]) -> None:
        self.space, self.by_class = Space(), set[int]()
        self.axes = self.own = self.space.fresh_axes(shape)

    def follow(self, step: fx.Node) -> bool:
        """Go on to the result of ``step``; False if it works along an axis that is no dim of the slice."""
        if step.target in VIEWS:
            self.axes = self.space.regroup(self.axes, step.meta["val"].shape)
        elif step.target in _PERMUTES:
            self.axes = tuple(self.axes[i] for i in _order(step))
        elif step.target in _BY_CLASS and not self._follow_classes(step):
            return False
        self.axes, self.own = (tuple(map(self.space.resolve, axes)) for axes in (self.axes, self.own))
        return True

    def _follow_classes(self, step: fx.Node) -> bool:
        dim = bind(step).get("dim", -1)
        before, after = self.axes[dim], self.space.fresh(step.meta["val"].shape[dim])
        if before not in self.own:
            return False
        self.by_class.add(self.own.index(before))
        self.axes, self.own = (tuple(after if x == before else x for x in axes) for axes in (self.axes, self.own))
        return True

    def rows_and_classes(self) -> tuple[tuple[int, ...], int] | None:
        """The dims of the slice in the order of the labels, and its classes; ``None`` if the value has other axes."""
        classes, order = self.axes[1], self.axes[0] + sum(self.axes[2:], ())
        if not classes or classes not in self.own:
            return None
        at, place = self.own.index(classes), {factor: i for i, factor in enumerate(order)}
        others = [dim for dim in range(len(self.own)) if dim != at]
        rows = sorted(others, key=lambda dim: place.get(self.own[dim][0], 0) if self.own[dim] else -1)
        is_known = sum((self.own[dim] for dim in rows), ()) == order and self.by_class <= {at}
        return (tuple(rows), at) if is_known else None


def _order(step: fx.Node) -> list[int]:
    """The dims of the operand of a permutation, in the order of its result."""
    dims = [*range(step.meta["val"].ndim)]
    if step.target is aten.permute.default:
        return [dims[dim] for dim in bind(step)["dims"]]
    a, b = (dims[-1], dims[0]) if step.target is aten.t.default else (dims[bind(step)[f"dim{i}"]] for i in (0, 1))
    dims[a], dims[b] = b, a
    return dims
