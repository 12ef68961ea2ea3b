"""The operation table: at least one row for each operation with an axes rule, and a sample of the pointwise family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from one_op import Case

aten = torch.ops.aten


def as_they_are(n, *operands):
    return operands


def each(ops: str, operands: str, rows: str, args: Callable[..., tuple] = as_they_are, **kwargs) -> list[Case]:
    """The same row for several operations."""
    found = [getattr(getattr(aten, name.split(".")[0]), name.split(".")[1]) for name in ops.split()]
    return [Case(op, operands, rows, args, kwargs) for op in found]


def first(*rest):
    """Arguments: the operand, then these."""
    return lambda n, x: (x, *rest)


def dim(n, x):
    """Arguments: the operand and a dim (1 in the law test, drawn in the oracle's)."""
    return x, n.dim


def dims(n, x):
    return x, [n.dim]


POINTWISE = [
    *each("add.Tensor sub.Tensor mul.Tensor div.Tensor maximum.default", "b t d, b t d", "b t d"),
    *each("add.Tensor mul.Tensor sub.Tensor", "b t d, d", "b t d"),
    *each("add.Tensor mul.Tensor div.Tensor", "b t d, 1 t 1", "b t d"),
    *each("add.Tensor mul.Tensor", "d, b t 1", "b t d"),
    *each("mul.Tensor", "b 1 d, b t 1", "b t d"),
    *each("add.Tensor", "B h T T, B 1 T T", "B h T"),
    *each("add.Tensor", "(b t) d, (b t) d", "b t d"),
    *each("mul.Scalar", "b t d", "b t d", first(3.0)),
    *each("pow.Tensor_Scalar", "b t d", "b t d", first(2)),
    *each("clamp.default", "b t d", "b t d", first(-0.5, 0.5)),
    *each("gelu.default silu.default tanh.default sigmoid.default clone.default", "t b d", "t b d"),
    *each("relu.default exp.default neg.default", "b (h t) d", "b h t d"),
    *each("where.self", "bool b 1 t, b d t, b d 1", "b d t"),
    *each("masked_fill.Scalar", "b t d, bool b t 1", "b t d", lambda n, x, mask: (x, mask, -2.0)),
    *each("masked_fill.Tensor", "b t d, bool b t 1, ", "b t d"),
    *each(
        "hardswish.default leaky_relu.default log_sigmoid.default contiguous.default alias.default detach.default",
        "b t d",
        "b t d",
    ),
    *each("lift_fresh_copy.default _to_copy.default", "b t d", "b t d"),
    *each("dropout.default native_dropout.default", "b t d", "b t d", first(0.0, True)),
    *each("to.dtype", "b t d", "b t d", first(torch.float32)),
    *each("to.device", "b t d", "b t d", first(torch.device("cpu"), torch.float64, False, True)),
    *each("to.dtype_layout", "b t d", "b t d", dtype=torch.float64),
    *each("to.other type_as.default", "B T D, B T D", "B T D"),
    *each("to.other type_as.default", "B T, T B e", "B T"),
    *each("__and__.Tensor __or__.Tensor", "bool b 1 t, bool b t t", "b t"),
    *each("__and__.Scalar __or__.Scalar", "bool b t", "b t", first(True)),
    *each("floor_divide.default", "<d b t d, const t d", "b t d"),
    *each("zeros_like.default ones_like.default", "b t d", "b t d"),
    *each("full_like.default fill.Scalar", "b t d", "b t d", first(2.0)),
    *each("_conj.default", "complex b t d", "b t d"),
]

CONTRACTIONS = [
    *each("linear.default", "b t i, o i, o", "b t o"),
    *each("linear.default", "t b i, o i", "b t o"),
    *each("linear.default", "(b t) i, o i, o", "b t o"),
    *each("linear.default", "b d T, T T", "b d T"),
    *each("mm.default", "i k, k j", "i j"),
    *each("mm.default", "(b t) k, k j", "b t j"),
    *each("bmm.default", "b t k, b k j", "b t j"),
    *each("bmm.default", "b T T, b T j", "b T j"),
    *each("matmul.default", "b h t k, b h k j", "b h t j"),
    *each("matmul.default", "b h T T, b h T j", "b h T j"),
    *each("matmul.default", "b t k, k j", "b t j"),
    *each("matmul.default", "b t k, k", "b t"),
    *each("matmul.default", "k, b k j", "b j"),
    *each("matmul.default", "k, k", ""),
    *each("matmul.default", "b 1 t k, h k j", "b t h j"),
    *each("addmm.default", "j, (b t) k, k j", "b t j"),
    *each("addmm.default", "i j, i k, k j", "i j"),
    *each("addmm.default", ", i k, k j", "i j"),
    *each("baddbmm.default", "b 1 j, b t k, b k j", "b t j"),
    *each("baddbmm.default", "b t j, b t k, b k j", "b t j"),
    *each("embedding.default", "v d, <v b t", "b t d"),
    *each("einsum.default", "b t k, b k j", "b t j", lambda n, x, y: ("btk,bkj->btj", [x, y])),
    *each("einsum.default", "b T h d, b T h d", "b T h", lambda n, x, y: ("bqhd,bkhd->bhqk", [x, y])),
    *each("cosine_similarity.default", "b t d, b t d", "b t", lambda n, x, y: (x, y, -1)),
    *each("cosine_similarity.default", "b t d, d", "b t", lambda n, x, y: (x, y, 2)),
    *each("cosine_similarity.default", "b 1 t d, h 1 d", "b h t", lambda n, x, y: (x, y, 3)),
    *each("einsum.default", "b t d, d", "b t", lambda n, x, y: ("btd,d->bt", [x, y])),
    *each("einsum.default", "b T T", "", lambda n, x: ("btt->bt", [x])),
    *each("einsum.default", "b t d, b t d", "", lambda n, x, y: ("...d,...d->...", [x, y])),
]


CONVOLUTIONS = [
    *each("conv1d.default", "b c t, o c t, o", "b", lambda n, x, w, b: (x, w, b, [1], [n.t])),
    *each("conv2d.default", "b c t w, o c t w", "b", lambda n, x, w: (x, w, None, [2, 1], [n.t, n.w])),
    *each("conv3d.default", "b c t w x, o c t w x", "b"),
    *each("conv1d.padding", "b c t, o c t", "b", lambda n, x, w: (x, w, None, [1], "same")),
    *each("conv2d.padding", "b c t w, o c t w", "b", lambda n, x, w: (x, w, None, [1], "same")),
    *each("conv3d.padding", "b c t w x, o c t w x", "b", lambda n, x, w: (x, w, None, [1], "valid")),
    *each(
        "convolution.default", "b c t, o c t", "b",
        lambda n, x, w: (x, w, None, [1], [n.t], [1], False, [0], 1),
    ),
    *each("conv1d.default", "c t, o c t", ""),
]  # fmt: skip


def _resized(*rest):
    return lambda n, x: (x, [n.t + 3, n.w + 2], *rest)


def _statistics(n, x, weight, bias):
    return x, weight, bias, True, 0.1, 1e-5


def _running(n, x, weight, bias, mean, var):
    return x, weight, bias, mean, var, True, 0.1, 1e-5


IMAGES = [
    *each("upsample_bilinear2d.vec upsample_bicubic2d.vec", "b c t w", "b c", _resized(False, None)),
    *each("upsample_nearest2d.vec", "b c t w", "b c", _resized(None)),
    *each("upsample_nearest1d.vec", "b c t", "b c", lambda n, x: (x, [n.t + 3], None)),
    *each("upsample_linear1d.vec", "b c t", "b c", lambda n, x: (x, [n.t + 3], False, None)),
    *each("avg_pool2d.default max_pool2d.default adaptive_avg_pool2d.default", "b c t w", "b c", first([2, 2])),
    *each("group_norm.default", "b c t, c, c", "b", lambda n, x, w, b: (x, 1, w, b)),
    *each("_native_batch_norm_legit.no_stats", "b c t, c, c", "", _statistics),
    *each("_native_batch_norm_legit_functional.default", "b c t, c, c, const c, const c", "", _running),
]


def _causal(n, q, k, v):
    return q, k, v, None, 0.0, True


ATTENTIONS = [
    *each("scaled_dot_product_attention.default", "b h T d, b h T d, b h T e", "b h T"),
    *each("scaled_dot_product_attention.default", "b h T d, b h T d, b h T d", "b h T", _causal),
    *each("scaled_dot_product_attention.default", "b h t d, b h s d, b h s d, bool b 1 t s", "b h t"),
    *each("scaled_dot_product_attention.default", "b h T d, b h T d, b h T d, T T", "b h T"),
    *each("scaled_dot_product_attention.default", "b h T d, b h T d, b h T d, bool 1 1 1 T", "b h T"),
    *each("scaled_dot_product_attention.default", "b (H r) T d, b H T d, b H T d", "b T", _causal, enable_gqa=True),
    *each("scaled_dot_product_attention.default", "b t d, b s d, b s d", "b t"),
]

MIXING_ALONG = [
    *each("softmax.int log_softmax.int cumsum.default cumprod.default logcumsumexp.default", "b t d", "b d", dim),
    *each("softmax.int", "b h T T", "b h T", first(-1)),
    *each("_softmax.default _log_softmax.default", "b t d", "b t", first(-1, False)),
    *each("layer_norm.default", "b t d, d, d", "b t", lambda n, x, w, b: (x, [n.d], w, b)),
    *each("layer_norm.default", "b t d", "b", lambda n, x: (x, [n.t, n.d])),
    *each("rms_norm.default", "b t d, d", "b t", lambda n, x, w: (x, [n.d], w)),
    *each("flip.default", "b t d", "b d", dims),
    *each("roll.default", "b t d", "b d", lambda n, x: (x, [1], [n.dim])),
    *each("roll.default", "b t d", "", first([1])),
    *each("sort.default argsort.default", "b t d", "b d", dim),
    *each("sort.stable", "b t d", "b t", stable=True),
    *each("argsort.stable", "b t d", "b t", stable=True),
    *each("topk.default", "b t d", "b d", lambda n, x: (x, 2, n.dim)),
    *each("glu.default", "b (p t) d", "b d", lambda n, x: (x, 1)),
    *each("slice.Tensor", "b t d", "b d", lambda n, x: (x, n.dim, 1)),
    *each("slice.Tensor", "b t d", "b t d", lambda n, x: (x, n.dim, 0, 2**63 - 1)),
    *each("slice.Tensor", "b t d", "b d", lambda n, x: (x, n.dim, 0, 2**63 - 1, 2)),
    *each("split.Tensor", "b t d", "b d", lambda n, x: (x, 2, n.dim)),
    *each("split_with_sizes.default", "b t d", "b d", lambda n, x: (x, [1, n.t - 1], 1)),
    *each("chunk.default tensor_split.sections", "b t d", "b d", lambda n, x: (x, 2, n.dim)),
    *each("index.Tensor", "b t d, <b b, <t b", "", lambda n, x, *at: (x, [*at])),
    *each("index.Tensor", "b t d, <t q r", "", lambda n, x, at: (x, [None, at])),
    *each("index.Tensor", "b t d, <b 1 q, <t b q", "", lambda n, x, *at: (x, [*at])),
    *each("index.Tensor", "b t d, bool b t", "", lambda n, x, at: (x, [at])),
    *each("index_select.default", "b t d, <t s", "b d", lambda n, x, index: (x, 1, index)),
    *each("repeat_interleave.self_int", "b t d", "b d", lambda n, x: (x, 2, n.dim)),
    *each("repeat_interleave.self_int", "b t d", "", first(2)),
    *each("pad.default constant_pad_nd.default", "b t d", "b d", first([0, 0, 1, 2])),
    *each("cat.default", "b t d, b s d", "b d", lambda n, x, y: ([x, y], 1)),
    *each("cat.default", "b t d, b t e", "b t", lambda n, x, y: ([x, y], -1)),
    *each("slice_scatter.default", "b t d, b 1 d", "b d", lambda n, x, y: (x, y, 1, 0, 1)),
    *each("select_scatter.default", "b t d, b d", "b d", lambda n, x, y: (x, y, 1, -1)),
    *each("gather.default", "b t d, <d b t q", "b t q", lambda n, x, at: (x, 2, at)),
    *each("gather.default", "b t d, <t b q d", "b q d", lambda n, x, at: (x, 1, at)),
    *each("gather.default", "b t d, <d 1 1 q", "q", lambda n, x, at: (x, 2, at)),
    *each("scatter.value", "b t d, <d b t q", "b t", lambda n, x, at: (x, 2, at, 1.5)),
    *each("scatter.src", "b t d, <d b t 1, b t 1", "b t", lambda n, x, at, y: (x, 2, at, y)),
    *each("scatter_add.default", "b t d, <t b q d, b q d", "b d", lambda n, x, at, y: (x, 1, at, y)),
    *each("repeat.default", "b t d", "b d", first([1, 2, 1])),
    *each("repeat.default", "t d", "t", first([3, 1, 2])),
]

REDUCTIONS = [
    *each("sum.dim_IntList mean.dim amax.default amin.default logsumexp.default", "b t d", "b d", dims),
    *each("sum.dim_IntList mean.dim amax.default", "b t d", "b d", lambda n, x: (x, [n.dim], True)),
    *each("sum.dim_IntList", "b t d", "t", first([0, -1])),
    *each("sum.dim_IntList mean.dim", "b t d", "", first(None)),
    *each("any.dim all.dim argmax.default argmin.default prod.dim_int max.dim min.dim", "b t d", "b d", dim),
    *each("argmax.default", "b t d", ""),
    *each("var.dim std.dim var.correction std.correction var_mean.correction", "b t d", "b d", dims),
    *each("var.correction", "b t d", "b d", dims, keepdim=True),
    *each("linalg_vector_norm.default norm.ScalarOpt_dim", "b t d", "b d", lambda n, x: (x, 2, [n.dim])),
    *each("count_nonzero.dim_IntList", "b t d", "b d", dims),
    *each("sum.default mean.default any.default all.default max.default min.default prod.default", "b t d", ""),
    *each("select.int", "b t d", "b d", lambda n, x: (x, n.dim, -1)),
    *each("unbind.int", "b t d", "b d", dim),
]

LAYOUT = [
    *each("view.default reshape.default _unsafe_view.default", "b t d", "b t d", lambda n, x: (x, [n.b * n.t, n.d])),
    *each("view.default reshape.default", "(b t) d", "b t d", lambda n, x: (x, [n.b, n.t, n.d])),
    *each("view.default", "b t (h d)", "b t h d", lambda n, x: (x, [n.b, n.t, n.h, n.d])),
    *each("view.default", "(b h) t d", "b h t d", lambda n, x: (x, [n.b, n.h, n.t * n.d])),
    *each("reshape.default", "b (w x) d", "b w x d", lambda n, x: (x, [n.b * n.w, n.x, n.d])),
    *each("reshape.default", "t b d", "t b d", lambda n, x: (x, [n.t, -1])),
    *each("flatten.using_ints", "b t d", "b t d", first(0, 1)),
    *each("flatten.using_ints", "t b d", "b t d", first(1)),
    *each("unflatten.int", "b (h t) d", "b h t d", lambda n, x: (x, 1, [n.h, n.t])),
    *each("view.dtype", "b t d", "b t d", first(torch.int64)),
    *each("view.dtype", "b t d", "b t", first(torch.int16)),
    *each("squeeze.default", "b 1 t 1 d", "b t d"),
    *each("squeeze.dim", "b 1 t", "b t", first(1)),
    *each("squeeze.dim", "b t 1", "b t", dim),
    *each("squeeze.dims", "1 b t 1", "b t", first([0, 3])),
    *each("unsqueeze.default", "b t d", "b t d", dim),
    *each("transpose.int", "b t d", "b t d", lambda n, x: (x, 0, n.dim)),
    *each("transpose.int", "b T T", "b T", first(1, 2)),
    *each("permute.default", "b t h d", "b t h d", first([2, 0, -1, 1])),
    *each("t.default numpy_T.default mT.default", "b t", "b t"),
    *each("mT.default numpy_T.default", "b t d", "b t d"),
    *each("movedim.int", "b t h d", "b t h d", lambda n, x: (x, n.dim, 0)),
    *each("movedim.intlist", "b t h d", "b t h d", first([0, 3], [2, 0])),
    *each("expand.default", "b 1 t d", "b t d", lambda n, x: (x, [n.b, 3, n.t, n.d])),
    *each("expand.default", "t 1", "t", lambda n, x: (x, [3, -1, 2])),
    *each("broadcast_tensors.default", "b t d, t 1", "b t d", lambda n, x, y: ([x, y],)),
    *each("stack.default", "b t d, b t d", "b t d", lambda n, x, y: ([x, y], n.dim)),
    *each("one_hot.default", "<d b t, const d", "b t", lambda n, x, d: (x, n.d)),
]


def _unreduced(n, *operands):
    return (*operands, *[None] * (3 - len(operands)), 0)


LOSSES = [
    *each("cross_entropy_loss.default nll_loss_nd.default", "t v, <v t", "t", _unreduced),
    *each("cross_entropy_loss.default", "(b t) v, <v (b t), const v", "b t", _unreduced),
    *each("cross_entropy_loss.default nll_loss_nd.default", "b v t, <v b t", "b t", _unreduced),
    *each("cross_entropy_loss.default", "b v, b v", "b", _unreduced),
    *each("cross_entropy_loss.default", "b v t, b v t", "b t", _unreduced),
    *each("mse_loss.default l1_loss.default smooth_l1_loss.default", "b t d, b t d", "b t d", reduction=0),
    *each("huber_loss.default binary_cross_entropy_with_logits.default", "b t d, b t d", "b t d", reduction=0),
    *each("binary_cross_entropy.default", "unit b t d, unit b t d", "b t d", reduction=0),
]

#: Random operations: run on the rows, they have the same distribution as the rows of a full draw, but other numbers.
RANDOM = [
    *each("rand_like.default randn_like.default empty_like.default", "b t d", "b t d"),
    *each("bernoulli.default", "b t d", "b t d"),
    *each("bernoulli.p", "b t d", "b t d", first(0.5)),
]

TABLE = [
    *(replace(case, shares=case.rows) for case in POINTWISE),
    *(replace(case, shares="b") for case in ATTENTIONS),
    *CONTRACTIONS,
    *CONVOLUTIONS,
    *IMAGES,
    *MIXING_ALONG,
    *REDUCTIONS,
    *LAYOUT,
    *LOSSES,
]
