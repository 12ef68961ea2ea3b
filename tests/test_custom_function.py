"""Custom autograd functions: they keep their backward, and run on the selected rows if both bodies allow it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import TOPK, by_reference, compiled, error, grads_of
from test_custom_op import HEADS, B, T, barriers  # noqa: F401 (a fixture)
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx.cli.predict import explain_without_weights

D = 8
OPTIONS = {"keep_ratio": 0.4, "strict": True, **TOPK}


def function(forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """A custom function of tensors that saves them all."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return forward(*args)

        @staticmethod
        def backward(ctx, grad):
            found = backward(grad, *ctx.saved_tensors)
            return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))

    return Custom


class SavesItsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 5 * grad * (1 - y * y)


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, by_sin, by_cos):
        (x,) = ctx.saved_tensors
        return 3 * by_sin * x.cos() - 3 * by_cos * x.sin()


def written_through_a_view(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, 1:] = x[:, :-1]
    y[:, :1] = x[:, :1]
    return y


# All backwards are 3 times the derivative: inlined, the gradient would differ.
POINTWISE = function(lambda x: x * x, lambda g, x: (6 * g * x,))
GATED = function(lambda x, y: F.silu(x) * y, lambda g, x, y: (3 * g * y * x.cos(), 3 * g * F.silu(x)))
SOFTMAX = function(
    lambda x: x.softmax(-1),
    lambda g, x: (3 * x.softmax(-1) * (g - (g * x.softmax(-1)).sum(-1, keepdim=True)),),
)
PRODUCT = function(lambda x, w: x @ w.t(), lambda g, x, w: (3 * g @ w, 3 * (g.flatten(0, 1).t() @ x.flatten(0, 1))))
TURNED = function(lambda x: x.transpose(0, 1).exp().transpose(0, 1), lambda g, x: (3 * g * x.exp(),))
MIXED = function(lambda x: x.cumsum(1), lambda g, x: (3 * g.flip(1).cumsum(1).flip(1),))
MIXED_BACK = function(lambda x: x * 2, lambda g, x: (6 * g + 0.1 * g.flip(1),))
MEAN_BACK = function(lambda x: x * 2, lambda g, x: (6 * g - g.mean(1, keepdim=True),))
OTHER_ROWS_BACK = function(lambda x: x * 2, lambda g, x: (6 * g * x.roll(1, 1),))
VIEW_WRITES = function(written_through_a_view, lambda g, x: (3 * g,))
SIZES = function(
    lambda x: x.reshape(B * T, D).sin().reshape(B, T, D), lambda g, x: (3 * g.reshape(B * T, D).reshape(B, T, D),)
)
CONSTANT = function(lambda x: x * torch.ones(B, T, 1, dtype=x.dtype), lambda g, x: (3 * g,))

#: name -> (a function of x and the weight, whether it is a barrier)
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "pointwise": (lambda x, w: POINTWISE.apply(x), False),
    "its result saved": (lambda x, w: SavesItsResult.apply(x), False),
    "two results": (lambda x, w: torch.cat(TwoResults.apply(x), -1)[..., ::2], False),
    "two operands": (lambda x, w: GATED.apply(x, x + 1), False),
    "one operand without gradient": (lambda x, w: GATED.apply(x, x.detach()), False),
    "operands broadcast": (lambda x, w: GATED.apply(x, w.detach()[0]), False),
    "along the features": (lambda x, w: SOFTMAX.apply(x), False),
    "turned and back": (lambda x, w: TURNED.apply(x), False),
    "a product with a frozen weight": (lambda x, w: PRODUCT.apply(x, w.detach()), False),
    "a product with a trained weight": (lambda x, w: PRODUCT.apply(x, w), True),
    "tokens mixed": (lambda x, w: MIXED.apply(x), True),
    "tokens mixed in the backward alone": (lambda x, w: MIXED_BACK.apply(x), True),
    "a mean over tokens in the backward": (lambda x, w: MEAN_BACK.apply(x), True),
    "the backward reads other rows": (lambda x, w: OTHER_ROWS_BACK.apply(x), True),
    "tokens mixed by writes through views": (lambda x, w: VIEW_WRITES.apply(x), True),
    "sizes of the token axis": (lambda x, w: SIZES.apply(x), True),
    "a constant with tokens": (lambda x, w: CONSTANT.apply(x), True),
    "of parameters alone": (lambda x, w: x @ POINTWISE.apply(w), False),
}


class Transformer(nn.Module):
    """Two blocks of attention and the custom function, on [B, T, D]."""

    def __init__(self, custom: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.custom = custom
        self.qkv = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.weight, self.head = nn.Parameter(torch.randn(D, D) / D), nn.Linear(D, 1)
        self.double()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for qkv, up in zip(self.qkv, self.up, strict=True):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(1, 2).flatten(2)
            x = x + self.custom(up(x), self.weight)
        return F.mse_loss(self.head(x).squeeze(-1), target)


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"x": torch.randn(B, T, D, generator=draw).double(), "target": torch.randn(B, T, generator=draw).double()}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES)
def test_exact_and_a_barrier_only_where_a_body_needs_all_tokens(case, inner, barriers):  # noqa: F811
    custom, is_barrier = CASES[case]
    model = Transformer(custom)
    run = compiled(model, batch(), inner=inner, keep_ratio=0.4)
    assert barriers == ["autograd_function_apply"] * (2 * is_barrier)
    assert error(run.grads, by_reference(model, batch(), run.indices, length=T).grads) < 1e-9


@pytest.mark.parametrize("reads", ["forward", "backward", "neither"])
def test_a_backward_that_reads_a_dynamic_length_is_a_barrier(reads, barriers):  # noqa: F811
    """For the rows of a gradient the length is another number; to the forward Dynamo passes it as an operand."""
    forward = {"forward": lambda x: x / x.shape[1]}.get(reads, lambda x: x * 2)
    backward = {"backward": lambda g, x: (3 * g / len(x[0]),)}.get(reads, lambda g, x: (6 * g,))
    custom = function(forward, backward)
    model = Transformer(lambda x, w: custom.apply(x))
    expected = copy.deepcopy(model)
    torch._dynamo.reset()
    step = torch.compile(model, backend="tokenseek", dynamic=True, options={**OPTIONS, "inner": "eager"})
    with tokenseek_fx.record() as rec:
        step(**batch()).backward()
    assert barriers == ["autograd_function_apply"] * (2 if reads == "backward" else 0)
    assert error(grads_of(model), by_reference(expected, batch(), rec[0].indices, length=T).grads) < 1e-9


def test_a_dynamic_length_may_be_a_number_where_only_sizes_are_read():
    """The length is dynamic in the graph and in its inputs, but the function is given a number."""
    custom = function(lambda x: x / x.shape[1], lambda g, x: (6 * g,))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(assume_static_by_default=False):
        found = explain_without_weights(Transformer(lambda x, w: custom.apply(x)), batch(), {"keep_ratio": 0.4})
    assert not found.refusal and not found.barriers
