"""Axes rules of ATen, by family. An operation without a rule has unknown axes, so it becomes a barrier."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..graph.factors import Axes, Space
from ..graph.nodes import tensors_in
from ..graph.op_sets import ELEMENTWISE_LOSSES, LABEL_LOSSES
from ..graph.registry import aten_overloads
from .op import AXES_RULES, AxesRule, Flow, Op, axes_rule

aten = torch.ops.aten


def formula(spec: str) -> AxesRule:
    """A rule from an einsum-like formula, e.g. ``formula("... i, o i, o -> ... o")``."""
    return lambda op: op.formula(spec)


def elementwise(op: Op) -> Flow:
    """The rule of pointwise operations: operands broadcast, and rows stay separate."""
    return op.elementwise()


def along(argument: str) -> AxesRule:
    """A rule for operations that mix along the dims named by an argument and keep their labels (softmax, cumsum)."""
    return lambda op: op.along(op.dims(argument), keep_labels=True)


def rule_for(target: object) -> AxesRule | None:
    """The axes rule of an operation: its own, or that of pointwise operations; ``None`` if it has no rule."""
    if target in AXES_RULES:
        return AXES_RULES[target]
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return AXES_RULES.get(target.name(), elementwise if torch.Tag.pointwise in target.tags else None)


# Pointwise operations without the tag.
axes_rule(
    *aten_overloads(
        "dropout.default native_dropout.default contiguous.default alias.default detach.default to.dtype to.device "
        "to.dtype_layout _to_copy.default lift_fresh_copy.default masked_fill.Tensor "
        "__and__.Tensor __or__.Tensor __and__.Scalar __or__.Scalar hardswish.default leaky_relu.default "
        "log_sigmoid.default floor_divide.default rand_like.default zeros_like.default ones_like.default "
        "full_like.default bernoulli.default bernoulli.p fill.Scalar _conj.default broadcast_tensors.default "
        "empty_like.default randn_like.default"
    ),
    rule=elementwise,
)

# Only the dtype and device of the second operand are read.
axes_rule(*aten_overloads("to.other type_as.default"), rule=lambda op: op.elementwise(op.operands[:1]))

# Contractions.
axes_rule(*aten_overloads("linear.default"), rule=formula("... i, o i, o -> ... o"))
axes_rule(*aten_overloads("mm.default"), rule=formula("i k, k j -> i j"))
axes_rule(*aten_overloads("bmm.default"), rule=formula("b i k, b k j -> b i j"))
axes_rule(*aten_overloads("embedding.default"), rule=formula("v d, ... -> ... d"))


@axes_rule("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_product(op: Op) -> Flow:
    """Rows in groups, one matrix per group. No row is carried: group ends depend on all rows."""
    if [len(op.axes(node)) for node in op.operands] != [2, 3, 1]:
        return op.unknown()
    return Flow(op.formula("s i, e i o, e -> s o").outputs, ({}, {}, {}))


@axes_rule(aten.matmul.default)
def matmul(op: Op) -> Flow:
    left, right = (len(op.axes(node)) for node in op.operands)
    terms = ["k" if left == 1 else "... i k", "k" if right == 1 else "... k j"]
    out = "..." + (" i" if left > 1 else "") + (" j" if right > 1 else "")
    return op.formula(", ".join(terms) + " -> " + out)


# Products with a packed weight, whose rows are not one of its dims.
axes_rule(
    "bitsandbytes::gemm_4bit",
    "bitsandbytes::gemv_4bit",
    rule=lambda op: op.along([len(op.axes(op.operands[0])) - 1]),
)


@axes_rule(aten.addmm.default, aten.baddbmm.default)
def add_then_matmul(op: Op) -> Flow:
    """``bias + a @ b``; the bias broadcasts to the result."""
    bias, left, _ = op.operands
    rank = len(op.axes(left))
    letters = " ".join(["b", "i", "j"][3 - len(op.axes(bias)) :])
    lead = "b " if rank == 3 else ""
    return op.formula(f"{letters}, {lead}i k, {lead}k j -> {lead}i j")


def convolution(op: Op) -> Flow:
    """Channels and positions are mixed; instances, if there is a batch dim, are not."""
    rank, weight = (len(op.axes(op[name])) for name in ("input", "weight"))
    return op.mixing(range(1, rank)) if rank == weight else op.unknown()


axes_rule(
    *aten_overloads(
        "conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding convolution.default"
    ),
    rule=convolution,
)


# Resizing and pooling of images: channels stay separate.
axes_rule(
    *aten_overloads(
        "upsample_bilinear2d.vec upsample_bicubic2d.vec upsample_nearest1d.vec upsample_nearest2d.vec "
        "upsample_linear1d.vec avg_pool2d.default max_pool2d.default adaptive_avg_pool2d.default"
    ),
    rule=lambda op: op.mixing(range(2, len(op.axes(op.operands[0])))),
)


@axes_rule(aten.einsum.default)
def einsum(op: Op) -> Flow:
    equation = op["equation"].replace(" ", "")
    if "->" not in equation or "..." in equation:
        return op.unknown()
    left, right = equation.split("->")
    if any(len(set(term)) < len(term) for term in left.split(",")):  # a diagonal
        return op.unknown()
    return op.formula(", ".join(" ".join(term) for term in left.split(",")) + " -> " + " ".join(right))


# Normalisations and scans: they mix along some dims and keep their labels.
axes_rule(
    *aten_overloads("softmax.int _softmax.default log_softmax.int _log_softmax.default cumsum.default cumprod.default"),
    rule=along("dim"),
)
axes_rule(*aten_overloads("logcumsumexp.default"), rule=along("dim"))


@axes_rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(op: Op) -> Flow:
    rank = len(op.axes(op.operands[0]))
    return op.along(range(rank - len(op["normalized_shape"]), rank), keep_labels=True)


@axes_rule(aten.group_norm.default)
def group_norm(op: Op) -> Flow:
    return op.along(range(1, len(op.axes(op.operands[0]))), keep_labels=True)


@axes_rule(aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats)
def batch_norm(op: Op) -> Flow:
    """In training mode every dim is mixed; the further results are statistics."""
    statistics = op.results[1:]
    axes = op.axes(op.operands[0])
    return Flow((axes, *(op.space.fresh_axes(x.shape) for x in statistics)), tuple({} for _ in op.operands))


# Reductions.
axes_rule(
    *aten_overloads(
        "sum.dim_IntList mean.dim amax.default amin.default any.dim all.dim argmax.default argmin.default var.dim "
        "std.dim var.correction std.correction logsumexp.default prod.dim_int linalg_vector_norm.default "
        "norm.ScalarOpt_dim max.dim min.dim var_mean.correction count_nonzero.dim_IntList"
    ),
    rule=lambda op: op.reduce(op.dims("dim"), bool(op.arguments.get("keepdim", False))),
)
axes_rule(
    *aten_overloads("sum.default mean.default any.default all.default max.default min.default prod.default"),
    rule=lambda op: op.reduce(range(len(op.axes(op.operands[0])))),
)


@axes_rule(aten.cosine_similarity.default)
def cosine_similarity(op: Op) -> Flow:
    """The operands broadcast; the dim of the vectors that are compared is removed."""
    ranks = [len(op.axes(node)) for node in op.operands]
    letters = [f"d{i}" for i in range(max(ranks))]
    terms = [" ".join(letters[len(letters) - rank :]) for rank in ranks]
    del letters[op.dims("dim", len(letters))[0]]
    return op.formula(f"{', '.join(terms)} -> {' '.join(letters)}")


@axes_rule(aten.one_hot.default)
def one_hot(op: Op) -> Flow:
    return op.permute([*range(len(op.axes(op.operands[0]))), None])


@axes_rule(*LABEL_LOSSES)
def cross_entropy(op: Op) -> Flow:
    """Logits [N..., C] or [N, C, ...] and targets [N, ...], or probabilities of the shape of the logits.

    The positions of logits and targets are the same axis; classes are contracted.
    """
    logits, target = op.axes(op["self"]), op.axes(op["target"])
    class_dim = 0 if len(logits) == 1 else 1
    positions = [dim for dim in range(len(logits)) if dim != class_dim]
    soft = len(logits) == len(target)
    for dim, label in zip(range(len(logits)) if soft else positions, target, strict=True):
        op.space.equate(logits[dim], label)
    if op["reduction"] != 0:
        return Flow(((),), tuple({} for _ in op.operands))
    out = tuple(logits[dim] for dim in positions)
    carry = dict(enumerate(positions))
    return Flow((out,), (carry, carry if soft else {i: i for i in range(len(out))}, *({} for _ in op.operands[2:])))


@axes_rule(*ELEMENTWISE_LOSSES)
def elementwise_loss(op: Op) -> Flow:
    a, b = op.operands[:2]
    if op["reduction"] == 0:
        return op.elementwise()
    for left, right in zip(reversed(op.axes(a)), reversed(op.axes(b)), strict=False):
        op.space.equate(left, right)
    return op.reduce(range(len(op.axes(a))))


def flow_of(node: fx.Node, space: Space, axes: dict[fx.Node, tuple[Axes, ...]]) -> Flow:
    """How axes flow through a node, by its rule; unknown without a rule."""
    tensors = tensors_in(node.meta.get("val")) if node.op != "output" else []
    if node.op != "call_function" or not tensors:
        return Flow(tuple(space.fresh_axes(x.shape) for x in tensors) or ((),))
    op, rule = Op(node, space, axes), rule_for(node.target)
    return rule(op) if rule else op.unknown()


@axes_rule(operator.getitem)
def getitem(op: Op) -> Flow:
    """One of several results, with the axes that its operation gave it."""
    source, index = op.node.args
    axes = op._axes[source][index]
    return Flow((axes,))
