"""Rows rules: an operation re-executed on the selected rows.

Most operations need none: their operands are restricted along the dim that carries the row, and the call is the same
(``rerun``). Rules are for operations whose *arguments* speak of tokens (the shape of a view, a causal flag) and for losses.
A rule is ``rule(call) -> value``; with ``call.rows(i)`` and ``call.full(i)`` it sees an operand restricted or in full. It
returns ``NotImplemented`` where it does not apply: the operation becomes a barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import GraphNotSupported
from ..factors import same_size

if TYPE_CHECKING:
    from ..call import Call

aten = torch.ops.aten
RowsRule = Callable[["Call"], Any]
ROWS_RULES: dict[Any, RowsRule] = {}
#: ATen's numbers of the reductions of a loss.
NONE, MEAN, SUM = 0, 1, 2

#: Operations whose operands don't broadcast to one result: one that all instances share can't be given a batch dim.
_FIXED_RANK = (
    aten.broadcast_tensors.default,
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.embedding.default,
    aten.einsum.default,
)
#: Losses whose target names a class, or says that a position has none.
LABEL_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default)
ELEMENTWISE_LOSSES = (
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
)
LOSSES = (*LABEL_LOSSES, *ELEMENTWISE_LOSSES)


def rows_rule(*targets: Any) -> Callable[[RowsRule], RowsRule]:
    """Register a rows rule for operations."""

    def register(function: RowsRule) -> RowsRule:
        ROWS_RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def rerun(call: Call) -> Any:
    """The default: the same call on operands restricted where they carry the row, in full elsewhere."""
    return call.target(*call.args, **call.kwargs) if restricts(call) else NotImplemented


def restricts(call: Call) -> bool:
    """True when the operation can run on rows: some operand carries them, and instances may have different ones."""
    return call.carries_rows and _instances_stay_apart(call)


def _instances_stay_apart(call: Call) -> bool:
    """True when a row needs operands of its own instance alone, so that instances may have different rows."""
    axes = call.streams.axes
    at = call.geometry.axis.batch_dim_of(axes.of(call.node))
    carrying = [i for i in range(len(call.operands)) if call.carried(i) is not None]
    return at is None or all(_has_instances(call, i, at) for i in carrying)


def _has_instances(call: Call, operand: int, at: int) -> bool:
    """True when an operand carries the batch to dim ``at`` of the result, or can be broadcast there."""
    axes = call.streams.axes
    labels, rank = axes.of(call.operands[operand]), len(axes.of(call.node))
    own = call.geometry.axis.batch_dim_of(labels)
    if own is not None:
        return axes.carried(call.node, operand, at) == own
    place = at + len(labels) - rank
    return call.target not in _FIXED_RANK and (place < 0 or not labels[place])


@rows_rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def regroup(call: Call) -> Any:
    return call.rows(0).reshape(call.shape) if call.carries_rows else NotImplemented


@rows_rule(aten.embedding.default)
def embedding(call: Call) -> Any:
    """A gradient by how often an id is there needs all ids."""
    return NotImplemented if call["scale_grad_by_freq"] else rerun(call)


@rows_rule(aten.expand.default)
def expand(call: Call) -> Any:
    return call.rows(0).expand(call.shape) if call.carries_rows else NotImplemented


@rows_rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Any:
    """Query rows attend to all keys; a causal flag becomes a comparison of positions."""
    if not restricts(call):
        return NotImplemented
    if call.attending is not None:
        return call.attend()
    if call.dim != call.rank(0) - 2:
        return _attention_beside(call)
    query, key, value = call.rows(0), call.context(1), call.context(2)
    mask = None if call["attn_mask"] is None else call.rows(3)
    if call["is_causal"]:
        mask = call.causal_mask()
    options = {name: call[name] for name in ("dropout_p", "scale", "enable_gqa")}
    return call.target(query, key, value, mask, **options)


@rows_rule(aten.matmul.default)
def product(call: Call) -> Any:
    """That of an attention with its values looks at them by position, where it can."""
    return rerun(call) if call.attending is None else call.attend()


def _attention_beside(call: Call) -> Any:
    """The tokens are a leading dim: one attention each, where keys and values have that dim too."""
    return rerun(call) if all(call.carried(i) is not None for i in range(3)) else NotImplemented


@rows_rule(*LABEL_LOSSES)
def label_loss(call: Call) -> Any:
    """The loss of the kept labelled positions at the scale of the full loss; 0 where no kept position has a label."""
    classes = min(1, call.rank(0) - 1)
    if call.streams.axes.row_dim(call.operands[0]) == classes:  # the tokens are the classes: each needs all of them
        return NotImplemented
    if call["reduction"] not in (MEAN, SUM) or call["target"].is_floating_point():
        return elementwise_loss(call)
    if call.geometry.weights is not None:
        return _weighted_label_loss(call)
    target, total, dtype = call.own_rows(1), _total_loss(call), call.node.meta["val"].dtype
    if call["reduction"] == MEAN:
        return (total / divisor(target, call["ignore_index"], call["weight"])).to(dtype)
    kept, labelled = (_labelled(t, call["ignore_index"], None) for t in (target, call.full(1)))
    return (total * (labelled / torch.where(kept > 0, kept, 1)).to(total.dtype)).to(dtype)


def _total_loss(call: Call) -> Any:
    """The sum of the losses of the rows."""
    head = call.streams.head_of(call.node)
    if head is not None:
        return head.losses(call.streams).sum()
    options = call.arguments_but("self", "target", "reduction")
    logits = _no_narrower_than_float(call.own_rows(0))
    return call.target(self=logits, target=call.own_rows(1), reduction=SUM, **options)


def _weighted_label_loss(call: Call) -> Any:
    """Sum of w_i l_i over the kept labelled positions; a mean divides it by all labelled positions, kept or not."""
    if call.streams.axes.row_dim(call.operands[1]) is None:
        return NotImplemented
    losses = token_losses(call)
    total, dtype = (losses * _weights(call, 1)).sum(), call.node.meta["val"].dtype
    if call["reduction"] == SUM:
        return total.to(dtype)
    return (total / divisor(call["target"], call["ignore_index"], call["weight"])).to(dtype)


def token_losses(call: Call) -> Any:
    """The loss of every row of a label loss, in the layout of its target, 0 where there is no label."""
    head = call.streams.head_of(call.node)
    if head is not None:
        return head.losses(call.streams)
    options = call.arguments_but("self", "target", "reduction")
    return call.target(
        self=_no_narrower_than_float(call.own_rows(0)), target=call.own_rows(1), reduction=NONE, **options
    )


def divisor(target: torch.Tensor, ignore_index: int, weight: torch.Tensor | None) -> torch.Tensor:
    """What a mean label loss divides by; 1 where no position has a label, so that the loss is 0."""
    labelled = _labelled(target, ignore_index, weight)
    return torch.where(labelled > 0, labelled, 1)


def _weights(call: Call, operand: int) -> torch.Tensor:
    """The weights of the rows, laid out as the rows of an operand."""
    axes, node = call.streams.axes, call.operands[operand]
    dim = axes.row_dim(node)
    assert dim is not None
    return call.geometry.weights_of(call.streams.seek[node].shape, axes.of(node), dim)


def _no_narrower_than_float(x: torch.Tensor) -> torch.Tensor:
    """A sum over many positions overflows in half precision; its mean, made of it before it is rounded, does not."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _labelled(target: torch.Tensor, ignore_index: int, weight: torch.Tensor | None) -> torch.Tensor:
    """How many positions have a label (by class weight, where given): what a mean loss divides by."""
    has_label = target != ignore_index
    return has_label.sum() if weight is None else (weight[torch.where(has_label, target, 0)] * has_label).sum()


@rows_rule(*ELEMENTWISE_LOSSES)
def elementwise_loss(call: Call) -> Any:
    """A loss without labels: every kept position counts."""
    if call["reduction"] not in (MEAN, SUM):
        return _refuse_weights(call) or rerun(call)
    if any(_is_by_token(call, weight) for weight in call.operands[2:]):
        raise GraphNotSupported("A loss is weighted by token inside its own call.", "Multiply it outside.", call.node)
    if call.geometry.weights is not None and call.streams.axes.row_dim(call.operands[0]) is not None:
        return _weighted_elementwise_loss(call)
    options = call.arguments_but("self", "target")
    scale = 1 if call["reduction"] == MEAN else call.geometry.tokens / call.geometry.kept
    return call.target(self=call.own_rows(0), target=call.own_rows(1), **options) * scale


def _is_by_token(call: Call, weight: fx.Node) -> bool:
    """True where a weight of a loss has more than one entry along the tokens of its input."""
    dim, shape = call.streams.axes.row_dim(call.operands[0]), weight.meta["val"].shape
    at = -1 if dim is None else dim - call.rank(0) + len(shape)
    return at >= 0 and not same_size(shape[at], 1)


def _weighted_elementwise_loss(call: Call) -> Any:
    """Sum of w_i l_i over the kept rows; a mean divides it by the number of all elements."""
    options = call.arguments_but("self", "target", "reduction")
    losses = call.target(self=call.own_rows(0), target=call.own_rows(1), reduction=NONE, **options)
    total = (losses * _weights(call, 0)).sum()
    total = total / call.streams.seek[call.operands[0]].numel() if call["reduction"] == MEAN else total
    return total.to(losses.dtype)


def _refuse_weights(call: Call) -> None:
    if call.geometry.weights is not None and call.carries_rows:
        raise GraphNotSupported(
            "The loss of every token is reduced outside of its own call, so sampled tokens have no place for a weight.",
            'Let the loss reduce (mean or sum), or choose with select="topk".',
            call.node,
        )
