"""Selected attention: k query rows attend to all S keys; only keys and values of selected rows get gradient.

    out[b, h, i] = sum over j of softmax_j(cap(q_i . k_j * scale) + mask) v_j      (sinks join the sum of the softmax)

``key`` and ``value`` hold all tokens, including the selected rows; ``row_key`` and ``row_value`` are the selected rows
with gradient. Nothing has to be scattered: the forward reads ``key`` and ``value``; the backward gives dq over all
keys, and dk, dv of k x k pairs, for which it reads ``key`` and ``value`` at ``columns``. Saved for backward: query,
key, value, out, the log-sum-exp, positions, sinks, and the tensors of the visibility.

``definition`` is a short reference implementation. The operator runs in blocks on CPU (``attention_blocks``) and as
Triton kernels on CUDA (``attention_triton``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import attention_blocks as blocks
from .attention_blocks import ScoreSpec, lse_like, rows_like
from .device import runs_triton
from .fully_masked import fill, grad_blind
from .visibility import ALL_KEYS, Visibility, with_flat_visibility

#: Largest head width that the kernels take: wider heads don't fit into a GPU's registers.
WIDEST = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


def selected_attention(
    query: Tensor,
    row_key: Tensor | None,
    row_value: Tensor | None,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    *,
    columns: Tensor | None = None,
    visibility: Visibility = ALL_KEYS,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of ``query`` [B, H, k, E] to ``key`` [B, Hkv, S, E] and ``value`` [B, Hkv, S, Ev]: [B, H, k, Ev].

    H is a multiple of Hkv (grouped heads). Half precision is accumulated in float32. A row that sees no key gives 0,
    unless it is in ``visibility.fully_masked``.

    Args:
        query, key, value: of one floating-point dtype. ``key`` and ``value`` get no gradient.
        row_key, row_value: [B, Hkv, m, E] and [B, Hkv, m, Ev], equal to ``key`` and ``value`` at ``columns``; they get
            the gradient. None (both): no key or value gets gradient.
        positions: int64 [B, k], sorted, the positions of the query rows among the S keys; None if no other argument
            needs them.
        columns: int64 [B, m], sorted, the positions of ``row_key``; None: ``positions``.
        visibility: which keys each row sees. ``fully_masked`` can't be given with ``sinks``.
        scale: factor of the scores; None: 1 / sqrt(E).
        softcap: if positive, scores become softcap tanh(scores / softcap).
        sinks: [H], for each head a score that joins the softmax and has no value.
        return_lse: also return the log-sum-exp of the scores [B, H, k], at least float32, without gradient.

    Returns:
        The output, or (output, log-sum-exp).

    Raises:
        ValueError: operands don't fit together.
    """
    _check(query, row_key, row_value, key, value, positions, columns, sinks, visibility)
    columns = None if row_key is None else positions if columns is None else columns
    mask = visibility.mask
    if mask is not None and mask.ndim < 4:
        visibility = replace(visibility, mask=mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    operands = (query, row_key, row_value, key, value, positions, columns, sinks)
    out, lse = _operator(query, value)(*operands, scale, softcap, *visibility.flat())
    return (out, lse) if return_lse else out


def is_selected_attention(target: Any) -> bool:
    """Whether a graph's operation is selected attention, in blocks of ATen operations or as a Triton kernel."""
    names = ("tokenseek_fx::selected_attention", "tokenseek_fx::selected_attention_triton")
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in names


def _operator(query: Tensor, value: Tensor) -> Any:
    """The Triton kernels if they support these tensors, otherwise blocks of ATen operations."""
    if runs_triton(query) and max(query.shape[-1], value.shape[-1]) <= WIDEST.get(query.dtype, 0):
        from . import attention_triton

        return attention_triton.forward
    return _forward


def _check(
    query: Tensor, row_key: Any, row_value: Any, key: Tensor, value: Tensor, positions: Any, columns: Any, sinks: Any,
    visibility: Visibility,
) -> None:  # fmt: skip
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads can't share {key.shape[1]} key heads. Their number must be a multiple."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}. Use one dtype for all.")
    if key.shape[:3] != value.shape[:3] or query.shape[-1] != key.shape[-1] or query.shape[0] != key.shape[0]:
        shapes = [list(t.shape) for t in (query, key, value)]
        raise ValueError(
            "Shapes of query {}, key {} and value {} don't match. "
            "Expected [B, H, k, E], [B, Hkv, S, E], [B, Hkv, S, Ev].".format(*shapes)
        )
    if (row_key is None) != (row_value is None):
        raise ValueError("Only one of row_key and row_value was given. Pass both or none.")
    if positions is None and (visibility.by_position or (row_key is not None and columns is None)):
        raise ValueError("causal, window, segments and row_key need the positions of the rows. Pass positions.")
    if visibility.mask is not None and visibility.mask.requires_grad:
        raise ValueError("The mask requires grad, but selected attention gives it no gradient. Detach it.")
    if visibility.fully_masked is not None and sinks is not None:
        raise ValueError(
            "fully_masked has no effect with sinks: they take all of the softmax of a fully masked row. "
            "Pass one of them."
        )


def definition(
    query, row_key, row_value, key, value, positions, *, columns=None, visibility=ALL_KEYS, scale=None, softcap=0.0,
    sinks=None,
) -> Tensor:  # fmt: skip
    """A dense reference implementation of ``selected_attention``, differentiated by autograd, for tests."""
    if row_key is not None:
        at = (positions if columns is None else columns)[:, None, :, None]
        key = key.detach().scatter(2, at.expand(row_key.shape), row_key)
        value = value.detach().scatter(2, at.expand(row_value.shape), row_value)
    groups, dtype = query.shape[1] // key.shape[1], torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype), key.to(dtype).repeat_interleave(groups, 1), value.to(dtype).repeat_interleave(groups, 1)
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    unmasked = scores if visibility.scored else scores.detach()
    visible = visibility.visible(positions, torch.arange(key.shape[2], device=query.device)[None])
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    mask = visibility.mask
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    sink = scores.new_full((query.shape[1],), -torch.inf) if sinks is None else sinks.to(dtype)
    scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)[..., :-1]
    if visibility.fully_masked is not None:
        equal = torch.softmax(unmasked - unmasked.detach(), -1)
        weights = torch.where(visibility.fully_masked[:, None, :, None], equal, weights)
    return (weights @ v).to(query.dtype)


@torch.library.custom_op("tokenseek_fx::selected_attention", mutates_args=())
@with_flat_visibility
def _forward(
    query: Tensor, row_key: Tensor | None, row_value: Tensor | None, key: Tensor, value: Tensor,
    positions: Tensor | None, columns: Tensor | None, sinks: Tensor | None, scale: float | None, softcap: float,
    visibility: Visibility,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    spec = ScoreSpec.of(query, key, positions, visibility, scale, softcap)
    out, lse = blocks.forward(query, key, value, sinks, spec)
    if visibility.fully_masked is not None:
        fill(out, value, visibility.fully_masked)
    return out, lse


@torch.library.custom_op("tokenseek_fx::selected_attention_grad_query", mutates_args=())
@with_flat_visibility
def _grad_query(
    grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None,
    scale: float | None, softcap: float, visibility: Visibility,
) -> Tensor:  # fmt: skip
    spec = ScoreSpec.of(query, key, positions, visibility, scale, softcap)
    return blocks.grad_query(grad, delta, lse, query, key, value, spec)


@torch.library.custom_op("tokenseek_fx::selected_attention_grad_keys", mutates_args=())
@with_flat_visibility
def _grad_keys(
    grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None,
    columns: Tensor, scale: float | None, softcap: float, visibility: Visibility,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    spec = ScoreSpec.of(query, key, positions, visibility, scale, softcap)
    return blocks.grad_selected(grad, delta, lse, query, key, value, columns, spec)


@torch.library.custom_op("tokenseek_fx::selected_attention_grad_every", mutates_args=())
@with_flat_visibility
def _grad_every(
    grad: Tensor, out: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    positions: Tensor | None, scale: float | None, softcap: float, visibility: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    spec = ScoreSpec.of(query, key, positions, visibility, scale, softcap)
    return blocks.grad_every(grad, out, delta, lse, query, key, value, spec)


def _fake_forward(query, row_key, row_value, key, value, *rest):
    return rows_like(query, value.shape[-1]), lse_like(query)


def _fake_grad_query(grad, delta, lse, query, *rest):
    return rows_like(query, query.shape[-1])


def _fake_grad_every(grad, out, delta, lse, query, key, value, *rest):
    return tuple(rows_like(t, t.shape[-1]) for t in (query, key, value))


def _fake_grad_keys(grad, delta, lse, query, key, value, positions, columns, *rest):
    return tuple(rows_like(t[:, :, : columns.shape[1]], t.shape[-1]) for t in (key, value))


def _setup_context(ctx, inputs, output) -> None:
    query, _, _, key, value, positions, columns, sinks, ctx.scale, ctx.softcap, *flat = inputs
    tensors, ctx.numbers = flat[: Visibility.TENSORS], flat[Visibility.TENSORS :]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, positions, columns, sinks, *tensors, *output)


def register(forward: Any, grad_query: Any, grad_keys: Any, grad_every: Any = None) -> None:
    """Register fake implementations of the operators, and the others as the backward of ``forward``.

    ``grad_every`` takes the place of the other two where every key gets gradient.
    """

    def backward(ctx, grad, _):
        query, key, value, positions, columns, sinks, *tensors, out, lse = ctx.saved_tensors
        visibility = Visibility.from_flat((*tensors, *ctx.numbers))
        needs = ctx.needs_input_grad
        grads: list[Any] = [None] * len(needs)
        if grad is None:
            return tuple(grads)
        of_means: Any = None
        if visibility.fully_masked is not None:
            found = (columns, visibility.fully_masked, visibility.scored, ctx.scale, ctx.softcap)
            of_means = grad_blind(grad, query, key, value, *found)
            grad = grad.masked_fill(visibility.fully_masked[:, None, :, None], 0)
        delta = (grad.to(lse.dtype) * out).sum(-1)
        operands = (grad, delta, lse, query, key, value, positions)
        form = (ctx.scale, ctx.softcap, *visibility.without_means().flat())
        if grad_every is not None and needs[0] and _is_every(columns, key):
            grads[:3] = grad_every(grad, out, *operands[1:], *form)
            needs = (False, False, False, *needs[3:])
        if needs[0]:
            grads[0] = grad_query(*operands, *form)
        if needs[1] or needs[2]:
            grads[1], grads[2] = grad_keys(*operands, columns, *form)
        if needs[7]:
            grads[7] = -((sinks[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
        if of_means is not None:
            grads[:3] = (None if mine is None else mine + more for mine, more in zip(grads, of_means, strict=False))
        return tuple(grads)

    forward.register_fake(_fake_forward)
    grad_query.register_fake(_fake_grad_query)
    if grad_every is not None:
        grad_every.register_fake(_fake_grad_every)
    grad_keys.register_fake(_fake_grad_keys)
    forward.register_autograd(backward, setup_context=_setup_context)


def _is_every(columns: Tensor | None, key: Tensor) -> bool:
    """Whether ``columns``, which are sorted, are all keys."""
    return columns is not None and statically_known_true(columns.shape[1] == key.shape[2])


register(_forward, _grad_query, _grad_keys, _grad_every)
