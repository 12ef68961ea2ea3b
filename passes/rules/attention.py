"""Attention rules: the query, key, value, mask, scale, soft cap and sinks of each attention operation.

    softmax over keys of (cap(Q K^T scale) + mask | sinks) V,   cap(x) = softcap tanh(x / softcap)

Every pass calls ``attention_op(node)``; no pass names an attention operation. ``scaled_dot_product_attention`` is
registered here; operations of other libraries are registered in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.factors import Axes, same_size
from ..graph.nodes import bind, is_tensor
from ..graph.op_sets import CONTRACTIONS
from ..graph.registry import Registry
from .op import AXES_RULES, Carry, Flow, Op


@dataclass(frozen=True)
class AttentionOp:
    """One call of an attention operation: its operands as nodes, its options as numbers.

    Args:
        query: [..., H, T, E].
        key: [..., Hkv, S, E], where ``Hkv`` divides ``H`` if ``enable_gqa``, else ``Hkv = H``.
        value: [..., Hkv, S, Ev].
        mask: bool (True: visible) or float added to the scores; broadcasts to [..., H, T, S].
        is_causal: the query at position i attends to keys 0..i.
        scale: factor of the scores; ``None``: ``1 / sqrt(E)``.
        dropout_p: dropout probability of the attention weights.
        softcap: the scores become ``softcap * tanh(scores / softcap)``; 0: no cap.
        sinks: one score per head, [H], that takes part in the softmax without a value.
        takes_bias: the operation accepts a float mask in place of a bool one.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    enable_gqa: bool = False
    softcap: float = 0.0
    sinks: fx.Node | None = None
    takes_bias: bool = False


AttentionRule = Callable[[dict[str, Any]], AttentionOp]
ATTENTION_RULES: Registry[AttentionRule] = Registry("attention rule")


def attention_rule(*targets: Any) -> Callable[[AttentionRule], AttentionRule]:
    """Register an attention operation: ``rule(arguments by schema name) -> AttentionOp``. Its axes rule follows.

    Raises:
        ValueError: a target has a rule already.

    >>> @attention_rule(torch.ops.mylib.attention.default)  # doctest: +SKIP
    ... def my_attention(given):
    ...     return AttentionOp(given["q"], given["k"], given["v"], is_causal=True)
    """

    def register(rule: AttentionRule) -> AttentionRule:
        ATTENTION_RULES.register(targets, rule)
        AXES_RULES.register(targets, attention_axes)
        return rule

    return register


def attention_op(node: Any) -> AttentionOp | None:
    """The call as an ``AttentionOp`` if the node is a registered attention operation, else ``None``."""
    target = getattr(node, "target", None)
    rule = ATTENTION_RULES.get(target)
    if rule is None and isinstance(target, torch._ops.OpOverload):
        rule = ATTENTION_RULES.get(target.name())
    return rule(bind(node)) if rule is not None else None


def read_across(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands that an operation reads at all positions: keys and values, or the right side of a product."""
    attention = attention_op(node)
    if attention is not None:
        return (attention.key, attention.value)
    return tuple(x for x in node.args[1:3] if isinstance(x, fx.Node)) if node.target in CONTRACTIONS else ()


def attention_axes(op: Op) -> Flow:
    """Query rows are carried; keys and values are mixed over all positions."""
    given = attention_op(op.node)
    assert given is not None
    query, key, value = (op.axes(node) for node in (given.query, given.key, given.value))
    rank, heads = len(query), (given.query, given.key)
    same_heads = rank <= 2 or same_size(*(node.meta["val"].shape[-3] for node in heads))
    for left, right in [(query, key), (key, value)]:
        for dim in range(-rank, -2):
            if same_heads or dim != -3:
                op.space.equate(left[dim], right[dim])
    op.space.equate(query[-1], key[-1])
    op.space.equate(key[-2], value[-2])
    of_context = {dim: dim for dim in range(rank - 2) if same_heads or dim != rank - 3}
    carries = {given.query: {dim: dim for dim in range(rank - 1)}, given.key: of_context, given.value: of_context}
    if is_tensor(given.mask):
        carries[given.mask] = _mask_carry(op, given.mask, (*query[:-1], key[-2]))
    outputs = ((*query[:-1], value[-1]), *(op.space.fresh_axes(x.shape) for x in op.results[1:]))
    return Flow(outputs, tuple(carries.get(node, {}) for node in op.operands))


def _mask_carry(op: Op, mask: Any, scores: Axes) -> Carry:
    """The mask broadcasts to the scores [..., q, k]; its row dim is the query's."""
    carry = {}
    for dim, label in enumerate(op.axes(mask)):
        out = dim + len(scores) - len(op.axes(mask))
        if label and not same_size(mask.meta["val"].shape[dim], 1):
            op.space.equate(scores[out], label)
            carry[out] = dim
    carry.pop(len(scores) - 1, None)
    return carry


@attention_rule(torch.ops.aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(given: dict[str, Any]) -> AttentionOp:
    """PyTorch's own attention operation."""
    same = ("query", "key", "value", "is_causal", "scale", "dropout_p", "enable_gqa")
    return AttentionOp(**{name: given[name] for name in same}, mask=given["attn_mask"], takes_bias=True)
