"""Row rules of losses: the loss of the kept rows at the scale of the full loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..graph.errors import GraphNotSupported
from ..graph.factors import Axes, same_size
from ..graph.op_sets import ELEMENTWISE_LOSSES, LABEL_LOSSES, MEAN, NONE, SUM
from .row_op import RowOp
from .rules import rerun, rows_rule


@rows_rule(*LABEL_LOSSES)
def label_loss(call: RowOp) -> Any:
    """The loss of the kept labelled positions at the scale of the full loss; 0 if no kept position has a label."""
    if call.streams.axes.row_dim(call.operands[0]) == class_dim(call.rank(0)):  # tokens are classes: all are needed
        return NotImplemented
    if call["reduction"] not in (MEAN, SUM):
        return elementwise_loss(call)
    if call.row_index.weights is not None:
        return _weighted_label_loss(call)
    if call["target"].is_floating_point():
        return elementwise_loss(call)
    counted, total, dtype = _labels_of_every_round(call), _total_loss(call), call.node.meta["val"].dtype
    if call["reduction"] == MEAN:
        return (total / divisor(counted, call["ignore_index"], call["weight"])).to(dtype)
    kept, labelled = (_labelled(t, call["ignore_index"], None) for t in (counted, call.full(1)))
    return (total * labelled / torch.where(kept > 0, kept, 1)).to(dtype)


def _total_loss(call: RowOp) -> Any:
    """The sum of the losses of the rows."""
    head = call.streams.head_of(call.node)
    if head is not None:
        return head.losses(call.streams).sum()
    options = call.arguments_but("self", "target", "reduction")
    logits = _no_narrower_than_float(call.own_rows(0))
    return call.target(self=logits, target=_own_labels(call), reduction=SUM, **options)


def _own_labels(call: RowOp) -> Any:
    """The labels of the rows; of moved rows all labels, ignored where the token is not kept."""
    labels = call.own_rows(1)
    if call.moved is None or labels.is_floating_point():
        return labels
    return torch.where(call.kept(_axes_of_losses(call)), labels, call["ignore_index"])


def _labels_of_every_round(call: RowOp) -> Any:
    """The labels that the loss counts: those of all kept rows, of which the rows may be one round."""
    index, labels, node = call.row_index.every_round, call.streams.axes.of(call.operands[1]), call.operands[1]
    dim = call.streams.axes.row_dim(node)
    if index is call.row_index or dim is None:
        return _own_labels(call)
    return index.take(call.full(1), labels, dim)


def _axes_of_losses(call: RowOp) -> Axes:
    """The axes of the unreduced losses."""
    axes = call.streams.axes.of(call.operands[0])
    at = class_dim(len(axes)) if call.target in LABEL_LOSSES else len(axes)
    return (*axes[:at], *axes[at + 1 :])


def _weighted_label_loss(call: RowOp) -> Any:
    """Sum of w_i l_i over the kept labelled positions; a mean divides it by all labelled positions, kept or not.

    With class probabilities every position is labelled.
    """
    if call.moved is None and call.streams.axes.row_dim(call.operands[1]) is None:
        return NotImplemented
    losses = token_losses(call)
    total, dtype = (losses * _weights(call, 1)).sum(), call.node.meta["val"].dtype
    if call["reduction"] == SUM:
        return total.to(dtype)
    return (total / divisor(call["target"], call["ignore_index"], call["weight"])).to(dtype)


def token_losses(call: RowOp) -> Any:
    """The losses of the rows of a label loss, in the layout of its positions; 0 where there is no label."""
    head = call.streams.head_of(call.node)
    if head is not None:
        return head.losses(call.streams)
    options = call.arguments_but("self", "target", "reduction")
    logits = _no_narrower_than_float(call.own_rows(0))
    return call.target(self=logits, target=_own_labels(call), reduction=NONE, **options)


def divisor(target: torch.Tensor, ignore_index: int, weight: torch.Tensor | None) -> torch.Tensor:
    """The divisor of a mean label loss; 1 if no position has a label, so that the loss is 0.

    With class probabilities it is the number of positions.
    """
    if target.is_floating_point():
        return torch.full((), target.numel() // target.shape[class_dim(target.ndim)], device=target.device)
    labelled = _labelled(target, ignore_index, weight)
    return torch.where(labelled > 0, labelled, 1)


def _weights(call: RowOp, operand: int) -> torch.Tensor:
    """The weights of the rows, laid out as the rows of an operand (of class probabilities: as their positions)."""
    axes, node = call.streams.axes, call.operands[operand]
    if call.moved is not None:
        return call.streams.row_numbers.weights(call.moved, _axes_of_losses(call))
    dim, shape, labels = axes.row_dim(node), call.streams.seek[node].shape, axes.of(node)
    assert dim is not None
    if call.target in LABEL_LOSSES and operand == 1:
        dim, shape, labels = positions_of(node.meta["val"], dim, shape, labels)
    return call.row_index.weights_of(shape, labels, dim)


def class_dim(rank: int) -> int:
    """The class dim of logits, and of class probabilities."""
    return min(1, rank - 1)


def positions_of(target: torch.Tensor, dim: int, shape: Sequence[Any], labels: Axes) -> tuple[int, list, Axes]:
    """Row dim, shape and axes of the positions of a target: of class probabilities, those without the class dim."""
    at = class_dim(target.ndim) if target.is_floating_point() else target.ndim
    return dim - (dim > at), [*shape[:at], *shape[at + 1 :]], (*labels[:at], *labels[at + 1 :])


def _no_narrower_than_float(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least float32: in half precision a sum over many positions may overflow where its mean does not."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _labelled(target: torch.Tensor, ignore_index: int, weight: torch.Tensor | None) -> torch.Tensor:
    """The number of positions with a label, or the sum of their class weights."""
    has_label = target != ignore_index
    return has_label.sum() if weight is None else (weight[torch.where(has_label, target, 0)] * has_label).sum()


@rows_rule(*ELEMENTWISE_LOSSES)
def elementwise_loss(call: RowOp) -> Any:
    """A loss without labels: every kept position counts."""
    if call["reduction"] not in (MEAN, SUM):
        _refuse_weights(call)
        return rerun(call) if call.moved is None else call.target(*call.in_full[0], **call.in_full[1])
    if any(_is_by_token(call, weight) for weight in call.operands[2:]):
        raise GraphNotSupported(
            "A loss is weighted by token inside its own call.",
            'Use reduction="none", multiply by the weights and reduce.',
            call.node,
        )
    has_rows = call.moved is not None or call.streams.axes.row_dim(call.operands[0]) is not None
    if has_rows and call.row_index.weights is not None:
        return _weighted_elementwise_loss(call)
    if call.moved is not None:
        return _moved_elementwise_loss(call)
    options = call.arguments_but("self", "target")
    scale = (
        _share_of_round(call) if call["reduction"] == MEAN else call.row_index.tokens / call.row_index.every_round.kept
    )
    return call.target(self=call.own_rows(0), target=call.own_rows(1), **options) * scale


def _share_of_round(call: RowOp) -> Any:
    """The share of the kept rows that are in this round, as the factor of their mean."""
    index = call.row_index
    return 1 if index.round_of is None else index.kept / index.every_round.kept


def _is_by_token(call: RowOp, weight: fx.Node) -> bool:
    """True if a weight of a loss has more than one entry along the tokens of its input."""
    labels, shape = call.streams.axes.of(call.operands[0]), weight.meta["val"].shape
    dim = call.streams.axes.row_dim(call.operands[0])
    dims = [i for i, label in enumerate(labels) if {*label} & {*call.moved.token}] if call.moved else [dim]
    places = [i - len(labels) + len(shape) for i in dims if i is not None]
    return any(at >= 0 and not same_size(shape[at], 1) for at in places)


def _moved_elementwise_loss(call: RowOp) -> Any:
    """The loss of the entries of kept tokens: their mean, or their sum at the scale of all entries."""
    options = call.arguments_but("self", "target", "reduction")
    losses = call.target(self=call.full(0), target=call.full(1), reduction=NONE, **options)
    kept = call.kept(_axes_of_losses(call)).expand(losses.shape)
    count = kept.sum()
    total = torch.where(kept, losses, 0).sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    mean = total / torch.where(count > 0, count, 1)
    return (mean if call["reduction"] == MEAN else mean * losses.numel()).to(losses.dtype)


def _weighted_elementwise_loss(call: RowOp) -> Any:
    """Sum of w_i l_i over the kept rows; a mean divides it by the number of all elements."""
    options = call.arguments_but("self", "target", "reduction")
    losses = call.target(self=call.own_rows(0), target=call.own_rows(1), reduction=NONE, **options)
    total = (losses * _weights(call, 0)).sum()
    total = total / call.streams.seek[call.operands[0]].numel() if call["reduction"] == MEAN else total
    return total.to(losses.dtype)


def _refuse_weights(call: RowOp) -> None:
    if (call.moved is not None or call.carries_rows) and call.row_index.weights is not None:
        raise GraphNotSupported(
            "The losses of tokens are reduced outside the loss call, so drawn tokens have no place for a weight.",
            'Let the loss reduce them (reduction="mean" or "sum"), or use select="topk".',
            call.node,
        )
