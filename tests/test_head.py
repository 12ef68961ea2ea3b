"""The head loss: the operator against cross entropy with autograd, and where the tail of a model uses it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenseek_fx.ops import head
from tokenseek_fx.ops.head import head_loss

IGNORED = -100
SIZES = st.integers(1, 9)


def example(n: int, d: int, v: int, bias: bool, ignored: float, dtype: torch.dtype, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, d, generator=generator).to(dtype) for size in (n, v))
    target = torch.randint(v, (n,), generator=generator)
    target = target.masked_fill(torch.rand(n, generator=generator) < ignored, IGNORED)
    return hidden, weight, torch.randn(v, generator=generator).to(dtype) if bias else None, target


def by_autograd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Losses and gradient from whole logits."""
    hidden = hidden.detach().requires_grad_()
    x = F.linear(hidden, weight, bias).to(dtype)
    x = softcap * torch.tanh(x / softcap) if softcap else x
    losses = F.cross_entropy(x * scale, target, ignore_index=IGNORED, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), hidden)[0]


@settings(max_examples=60, deadline=None)
@given(
    SIZES, SIZES, st.integers(2, 40), st.booleans(), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 3.0, -2.0]),
    st.sampled_from([1.0, 0.3, -2.0]), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(1, 9),
)  # fmt: skip
def test_losses_and_gradients_are_those_of_cross_entropy(n, d, v, bias, ignored, softcap, scale, kind, rows):
    dtype = torch.promote_types(kind, torch.float32)
    given = example(n, d, v, bias, ignored, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "BLOCK_BYTES", rows * v * dtype.itemsize)
        losses, grad = head_loss(*given, IGNORED, softcap, scale, dtype, True)
    expected = by_autograd(*given, softcap, scale, dtype)
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[
        kind
    ]  # bfloat16: the products are rounded to it
    torch.testing.assert_close(losses, expected[0], rtol=tol, atol=tol)
    torch.testing.assert_close(grad, expected[1], rtol=tol, atol=tol * max(1.0, abs(scale)))
    assert losses.dtype == dtype and grad.dtype == kind


def test_large_logits_do_not_overflow():
    hidden, weight, _, target = example(5, 4, 7, False, 0.0, torch.float32)
    losses, grad = head_loss(hidden * 1e4, weight, None, target, IGNORED, 0.0, 1.0, torch.float32, True)
    expected = by_autograd(hidden * 1e4, weight, None, target, 0.0, 1.0, torch.float32)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-5)


def test_without_the_gradient_none_is_computed():
    losses, grad = head_loss(*example(5, 4, 7, True, 0.4, torch.float64), IGNORED, 0.0, 1.0, torch.float64, False)
    expected = by_autograd(*example(5, 4, 7, True, 0.4, torch.float64), 0.0, 1.0, torch.float64)
    torch.testing.assert_close(losses, expected[0])
    assert grad.shape == (0,)


def test_a_label_that_is_no_class_is_an_error():
    hidden, weight, bias, target = example(5, 4, 7, True, 0.0, torch.float32)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        head_loss(hidden, weight, bias, target + 7, IGNORED, 0.0, 1.0, torch.float32, True)


def test_autocast_outside_does_not_change_the_product():
    inputs = example(5, 4, 7, True, 0.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(*inputs, IGNORED, 0.0, 1.0, torch.float32, True)
    for x, y in zip(found, head_loss(*inputs, IGNORED, 0.0, 1.0, torch.float32, True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("gradient", [True, False])
def test_the_operator_keeps_its_contract(gradient):
    inputs = example(5, 4, 7, True, 0.4, torch.bfloat16)
    torch.library.opcheck(head_loss, (*inputs, IGNORED, 2.0, 0.5, torch.float32, gradient))
