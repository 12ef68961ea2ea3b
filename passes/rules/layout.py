"""Axes rules of layout: views, permutations, slices, indexing, concatenation."""

from __future__ import annotations

import torch
from torch import fx

from ..graph.factors import Dim, same_size
from ..graph.registry import aten_overloads
from .op import Flow, Op, axes_rule

aten = torch.ops.aten


axes_rule(
    *aten_overloads("view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int view.dtype"),
    rule=Op.regroup,
)
axes_rule(*aten_overloads("squeeze.default squeeze.dim squeeze.dims unsqueeze.default"), rule=Op.regroup)


@axes_rule(aten.transpose.int)
def transpose(op: Op) -> Flow:
    order = list(range(len(op.axes(op.operands[0]))))
    (a,), (b,) = op.dims("dim0"), op.dims("dim1")
    order[a], order[b] = order[b], order[a]
    return op.permute(order)


axes_rule(*aten_overloads("permute.default"), rule=lambda op: op.permute(op.dims("dims")))
axes_rule(*aten_overloads("t.default numpy_T.default mT.default"), rule=lambda op: op.permute(_last_two_swapped(op)))


def _last_two_swapped(op: Op) -> list[int]:
    order = list(range(len(op.axes(op.operands[0]))))
    return order[::-1] if op.node.target != aten.mT.default else [*order[:-2], order[-1], order[-2]]


@axes_rule(aten.movedim.int, aten.movedim.intlist)
def movedim(op: Op) -> Flow:
    sources, targets = op.dims("source"), op.dims("destination")
    rest = iter(dim for dim in range(len(op.axes(op.operands[0]))) if dim not in sources)
    moved = dict(zip(targets, sources, strict=True))
    return op.permute([moved[i] if i in moved else next(rest) for i in range(len(op.results[0].shape))])


@axes_rule(aten.expand.default)
def expand(op: Op) -> Flow:
    source, shape = op.operands[0], op.results[0].shape
    new = len(shape) - len(op.axes(source))
    sizes = source.meta["val"].shape
    return op.permute(
        [i - new if i >= new and same_size(sizes[i - new], shape[i]) else None for i in range(len(shape))]
    )


@axes_rule(aten.slice.Tensor)
def slice_(op: Op) -> Flow:
    """A slice that takes everything is the identity; another one is a new axis."""
    (dim,) = op.dims("dim")
    whole = same_size(op.operands[0].meta["val"].shape[dim], op.results[0].shape[dim]) and op["step"] == 1
    return op.along([] if whole else [dim])


axes_rule(
    *aten_overloads("split.Tensor split_with_sizes.default chunk.default tensor_split.sections"),
    rule=lambda op: op.along(op.dims("dim")),
)
axes_rule(*aten_overloads("argsort.default argsort.stable"), rule=lambda op: op.along(op.dims("dim")))


def ordered(op: Op) -> Flow:
    """Values and where they stood have the same axes."""
    flow = op.along(op.dims("dim"))
    return Flow((flow.outputs[0],) * len(flow.outputs), flow.carries)


axes_rule(*aten_overloads("topk.default sort.default sort.stable"), rule=ordered)
axes_rule(*aten_overloads("glu.default"), rule=lambda op: op.along(op.dims("dim")))
axes_rule(*aten_overloads("flip.default roll.default"), rule=lambda op: op.along(op.dims("dims")))
axes_rule(*aten_overloads("index_select.default repeat_interleave.self_int"), rule=lambda op: _along_optional(op))
axes_rule(*aten_overloads("select.int"), rule=lambda op: op.reduce(op.dims("dim")))
axes_rule(*aten_overloads("unbind.int"), rule=lambda op: op.reduce(op.dims("dim")))


@axes_rule(aten.index.Tensor)
def index(op: Op) -> Flow:
    """``x[:, i, j]`` with neighbouring integer indices: their broadcast dims stand in place of the dims that they index.
    Nothing is carried: what is read of ``x`` depends on values."""
    indexed = [dim for dim, where in enumerate(op["indices"]) if where is not None]
    first, after, source = indexed[0], indexed[-1] + 1, op.axes(op.operands[0])
    if len(indexed) != after - first or any(where.meta["val"].dtype == torch.bool for where in op.operands[1:]):
        return op.unknown()
    last = op.results[0].ndim - (len(source) - after)
    found: list[Dim] = [()] * (last - first)
    for dim, where in zip(indexed, op.operands[1:], strict=True):
        if _counts(where, op.operands[0].meta["val"].shape[dim]):  # x[arange(B), i]: every instance, in order
            op.space.equate(source[dim], op.axes(where)[0])
        for place, label in zip(range(1, last - first + 1), reversed(op.axes(where)), strict=False):
            found[-place] = op.join(found[-place], label)
    return Flow(((*source[:first], *found, *source[after:]),), tuple({} for _ in op.operands))


@axes_rule(aten.gather.default)
def gather(op: Op) -> Flow:
    """``x[i][index[i, j]]``: every row by its own index, along the other dims."""
    source, where = op["self"], op["index"]
    (dim,) = op.dims("dim")
    rank, sizes = op.results[0].ndim, source.meta["val"].shape
    same = [i for i in range(rank) if i != dim and same_size(sizes[i], op.results[0].shape[i])]
    for i in same:
        op.space.equate(op.axes(source)[i], op.axes(where)[i])
    return Flow((op.axes(where),), ({i: i for i in same}, {i: i for i in range(rank)}))


@axes_rule(aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
def scatter(op: Op) -> Flow:
    """A value with some places along one dim replaced, every row by its own index."""
    whole, *parts = op.operands
    (dim,) = op.dims("dim")
    rows = [i for i in range(op.results[0].ndim) if i != dim]
    for part in parts:
        if any(not same_size(part.meta["val"].shape[i], op.results[0].shape[i]) for i in rows):
            return op.unknown()
        for i in rows:
            op.space.equate(op.axes(whole)[i], op.axes(part)[i])
    return Flow((op.axes(whole),), tuple({i: i for i in rows} for _ in op.operands))


def _counts(node: fx.Node, size: object) -> bool:
    """True for ``arange(size)``."""
    counts = node.target is aten.arange.default or (node.target is aten.arange.start and node.args[0] == 0)
    return bool(counts) and same_size(node.meta["val"].shape[0], size)


def _along_optional(op: Op) -> Flow:
    return op.unknown() if op["dim"] is None else op.along(op.dims("dim"))


@axes_rule(aten.repeat.default)
def repeat(op: Op) -> Flow:
    repeats = op["repeats"]
    new = len(repeats) - len(op.axes(op.operands[0]))
    return op.permute([i - new if i >= new and same_size(n, 1) else None for i, n in enumerate(repeats)])


@axes_rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(op: Op) -> Flow:
    amounts, rank = op["pad"], len(op.axes(op.operands[0]))
    padded = [rank - 1 - i // 2 for i, n in enumerate(amounts) if not same_size(n, 0)]
    return op.along(padded)


@axes_rule(aten.cat.default)
def cat(op: Op) -> Flow:
    """Concatenation: the other dims agree, the dim itself is new (empty 1-D operands are ignored by ATen)."""
    rank = op.results[0].ndim
    (dim,) = op.dims("dim", rank)
    parts = [node for node in op.operands if node.meta["val"].ndim == rank]
    if len(parts) == 1:  # an empty key/value cache before the keys: nothing is joined
        return Flow((op.axes(parts[0]),), tuple({i: i for i in range(rank)} if n in parts else {} for n in op.operands))
    others = [i for i in range(rank) if i != dim]
    for part in parts[1:]:
        for i in others:
            op.space.equate(op.axes(parts[0])[i], op.axes(part)[i])
    out = tuple(op.space.fresh(op.results[0].shape[dim]) if i == dim else op.axes(parts[0])[i] for i in range(rank))
    return Flow((out,), tuple({i: i for i in others} if node in parts else {} for node in op.operands))


@axes_rule(aten.slice_scatter.default, aten.select_scatter.default)
def scatter_part(op: Op) -> Flow:
    """A part of one dim is replaced; the other dims agree."""
    whole, part = (op.axes(op[name]) for name in ("self", "src"))
    (dim,) = op.dims("dim")
    dims = {i: i - (op.node.target is aten.select_scatter.default and i > dim) for i in range(len(whole)) if i != dim}
    for i, j in dims.items():
        op.space.equate(whole[i], part[j])
    return Flow((whole,), ({i: i for i in dims}, dims))


@axes_rule(aten.stack.default)
def stack(op: Op) -> Flow:
    rank = op.results[0].ndim
    (dim,) = op.dims("dim", rank)
    first = op.axes(op.operands[0])
    for node in op.operands[1:]:
        for left, right in zip(first, op.axes(node), strict=True):
            op.space.equate(left, right)
    out = (*first[:dim], op.space.fresh(op.results[0].shape[dim]), *first[dim:])
    return Flow((out,), tuple({i + (i >= dim): i for i in range(len(first))} for _ in op.operands))
