"""Sets of operations that several passes use."""

from __future__ import annotations

import torch

aten = torch.ops.aten

#: Views that regroup the factors of dims; ``reshape`` may copy.
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
#: Copies with the same dtype.
COPIES = (aten.clone.default, aten.contiguous.default)
#: Changes of dtype or device.
CONVERSIONS = (aten._to_copy.default, aten.to.dtype)
#: Operations that change neither the shape nor (up to rounding) the values.
CASTS = (*CONVERSIONS, *COPIES)
#: Operations that change only the shape or layout of their operand, in every overload.
LAYOUT = {
    getattr(packet, overload)
    for packet in (
        getattr(aten, name)
        for name in [
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "transpose",
            "permute",
            "expand",
            "t",
            "numpy_T",
            "contiguous",
            "clone",
        ]
    )
    for overload in packet.overloads()
}

#: Matrix products: under autocast, their operands are cast to the dtype of the result.
MATMULS = (
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
)
#: Products of two activations: attention weights with values, queries with keys.
CONTRACTIONS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)
#: Elementwise multiplications.
MULTIPLICATIONS = (aten.mul.Tensor, aten.mul.Scalar)
DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
#: Sums and means of some dims or of all.
SUMS = (aten.sum.default, aten.sum.dim_IntList)
MEANS = (aten.mean.default, aten.mean.dim)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)

#: Operations that create a tensor and read only the dtype, device and shape of their operand.
NEW_TENSORS = (
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
)
#: Operations that read some positions of a value.
PICKS = (
    aten.select.int,
    aten.slice.Tensor,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.take_along_dim.default,
)

#: ATen's codes for the reduction of a loss.
NONE, MEAN, SUM = 0, 1, 2
#: Losses whose target holds class labels; ``ignore_index`` marks positions without a label.
LABEL_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default)
#: Losses of two tensors of equal shape.
ELEMENTWISE_LOSSES = (
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
)
LOSSES = (*LABEL_LOSSES, *ELEMENTWISE_LOSSES)
