"""The head loss: the operator compared with cross entropy and autograd, and its use in the tail of a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import executed
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from marks import needs_triton
from scores import Watch
from test_random import V
from test_scores import B, Decoder, T, close, tokens
from torch import Tensor, nn

from tokenseek_fx.ops import head
from tokenseek_fx.ops.head import head_loss
from tokenseek_fx.passes.streams import scoring_tail as tail
from tokenseek_fx.passes.streams.linear_head import Head, find_head

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
    SIZES, SIZES, st.integers(2, 40), st.booleans(), st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.0, 3.0, -2.0]), st.sampled_from([1.0, 0.3, -2.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(1, 9),
)  # fmt: skip
def test_losses_and_gradients_are_those_of_cross_entropy(n, d, v, bias, ignored, softcap, scale, kind, side):
    dtype = torch.promote_types(kind, torch.float32)
    given = example(n, d, v, bias, ignored, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.TILE_BYTES, "cpu", side**2 * dtype.itemsize)
        losses, grad, _ = head_loss(*given, IGNORED, softcap, scale, dtype, True)
    expected = by_autograd(*given, softcap, scale, dtype)
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[
        kind
    ]  # bfloat16: the products are rounded to it
    torch.testing.assert_close(losses, expected[0], rtol=tol, atol=tol)
    torch.testing.assert_close(grad, expected[1], rtol=tol, atol=tol * max(1.0, abs(scale)))
    assert losses.dtype == dtype and grad.dtype == kind


@settings(max_examples=40, deadline=None)
@given(
    SIZES, SIZES, st.integers(2, 40), st.booleans(), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 3.0]),
    st.sampled_from([1.0, -2.0]), st.sampled_from([torch.float64, torch.bfloat16]), st.integers(1, 9),
    st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
)  # fmt: skip
def test_its_backward_is_that_of_cross_entropy(n, d, v, bias, ignored, softcap, scale, kind, side, trained):
    dtype = torch.promote_types(kind, torch.float32)
    *parts, target = example(n, d, v, bias, ignored, kind)
    leaves = [x.requires_grad_(on) for x, on in zip(parts, (True, *trained), strict=True) if x is not None]
    back = torch.linspace(-1, 2, n, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.TILE_BYTES, "cpu", side**2 * dtype.itemsize)
        losses = head_loss(*parts, target, IGNORED, softcap, scale, dtype, False)[0]
        found = torch.autograd.grad(losses, [x for x in leaves if x.requires_grad], back)
    whole = F.linear(*parts).to(dtype)
    whole = softcap * torch.tanh(whole / softcap) if softcap else whole
    losses = F.cross_entropy(whole * scale, target, ignore_index=IGNORED, reduction="none")
    expected = torch.autograd.grad(losses, [x for x in leaves if x.requires_grad], back)
    tol = 1e-12 if kind is torch.float64 else 4e-2  # bfloat16: slopes, and products of every tile, are rounded to it
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype is kind
        torch.testing.assert_close(mine, other, rtol=tol, atol=tol * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("gradient", [True, False])
def test_classes_that_are_ruled_out_may_fill_a_tile(gradient, monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 4 * 8)
    hidden, weight, _, target = example(5, 4, 9, False, 0.0, torch.float64)
    bias = torch.zeros(9, dtype=torch.float64).index_fill(0, torch.arange(3, 7), -torch.inf)
    target = target.clamp(max=2)
    losses, grad, _ = head_loss(hidden, weight, bias, target, IGNORED, 0.0, 1.0, torch.float64, gradient)
    expected = by_autograd(hidden, weight, bias, target, 0.0, 1.0, torch.float64)
    torch.testing.assert_close(losses, expected[0])
    assert not gradient or torch.allclose(grad, expected[1])


def test_large_logits_do_not_overflow():
    hidden, weight, _, target = example(5, 4, 7, False, 0.0, torch.float32)
    losses, grad, _ = head_loss(hidden * 1e4, weight, None, target, IGNORED, 0.0, 1.0, torch.float32, True)
    expected = by_autograd(hidden * 1e4, weight, None, target, 0.0, 1.0, torch.float32)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-5)


def test_without_the_gradient_none_is_computed():
    losses, grad, _ = head_loss(*example(5, 4, 7, True, 0.4, torch.float64), IGNORED, 0.0, 1.0, torch.float64, False)
    expected = by_autograd(*example(5, 4, 7, True, 0.4, torch.float64), 0.0, 1.0, torch.float64)
    torch.testing.assert_close(losses, expected[0])
    assert grad.shape == (0,)


@pytest.mark.parametrize("gradient", [True, False])
def test_logits_of_all_rows_and_classes_never_exist(gradient):
    hidden, weight, _, target = example(8192, 4, 3000, False, 0.0, torch.float32)
    how = (IGNORED, 0.0, 1.0, torch.float32)
    with Largest() as largest:
        losses, _, total = head_loss._init_fn(hidden, weight, None, target, *how, gradient)
        head.head_loss_backward._init_fn(losses, hidden, weight, None, target, total, *how, True, False)
    assert largest.bytes <= head.TILE_BYTES["cpu"] < 8192 * 3000 * 4 / 40


def test_a_label_out_of_range_is_an_error():
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


@needs_triton
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(2, 150), st.booleans(), st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.0, 3.0]), st.sampled_from([1.0, -0.3]), st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
)  # fmt: skip
def test_the_kernels_equal_the_operator(n, d, v, bias, ignored, softcap, scale, kind, gradient):
    from tokenseek_fx.ops import head_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU in Triton's interpreter, see conftest.py
    inputs = [x if x is None else x.to(device) for x in example(n, d, v, bias, ignored, kind)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_triton, "blocks", lambda *_: {"D": d, "BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 16})
        patch.setattr(head_triton, "PARTS", 3)
        losses, grad = head_triton.head_loss_triton(*inputs, IGNORED, softcap, scale, gradient)
    expected = head_loss(*inputs, IGNORED, softcap, scale, torch.float32, gradient)
    tol = 1e-4 if kind is torch.float32 else 2e-2  # float16: the operator rounds its logits to it, the kernels do not
    torch.testing.assert_close(losses, expected[0], rtol=tol, atol=tol)
    torch.testing.assert_close(grad, expected[1], rtol=tol, atol=tol)


# ---- in the tail of a model


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 3 * 0.7


class CappedInside(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * torch.tanh(0.4 * super().forward(x))


class Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class FlatProduct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x.flatten(0, 1), self.weight.t()).unflatten(0, (B, T))


class Adapted(nn.Linear):
    """As LoRA does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * F.linear(x[..., :3], self.weight[:, :3])


class CappedTwice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(2 * torch.tanh(super().forward(x)))


class ByToken(nn.Linear):
    """A temperature for every token."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x[..., :1].sigmoid()


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + 1.5).square() * 0.1


class Rounded(nn.Linear):
    """Logits that pass through float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().double()


def by_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits.flatten(0, 1), -1), labels.flatten())


def nll_of_two(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(F.log_softmax(logits.flatten(0, 1), -1) * 2, -1), labels.flatten())


def of_plain_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Not normalised, so not a cross entropy."""
    return F.nll_loss(logits.flatten(0, 1), labels.flatten())


def transposed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def with_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.clone().flatten(0, 1), labels.flatten()) + 0.01 * logits.square().mean()


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), torch.linspace(0.5, 2, V, dtype=torch.float64))


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def decoder(head: type[nn.Linear], loss: Any = None, bias: bool = False) -> Decoder:
    model = Decoder(loss=loss)
    model.head = head(16, V, bias=bias)
    return model.double()


@pytest.fixture
def heads(monkeypatch) -> list[Head | None]:
    """The head that was found for each tail."""
    found: list[Head | None] = []

    def keep(*args: Any) -> Head | None:
        found.append(find_head(*args))
        return found[-1]

    monkeypatch.setattr(tail, "find_head", keep)
    return found


FOUND = {
    "linear": decoder(nn.Linear),
    "linear with a bias": decoder(nn.Linear, bias=True),
    "factors": decoder(Scaled, bias=True),
    "a soft cap": decoder(CappedInside),
    "a product with the transposed weight": decoder(Product),
    "a product of flat rows": decoder(FlatProduct),
    "the loss by log-softmax": decoder(nn.Linear, by_nll),
    "a loss over a sum": decoder(
        nn.Linear, lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum")
    ),
}
OTHERS = {
    "an adapted head": decoder(Adapted),
    "two caps": decoder(CappedTwice),
    "a temperature of every token": decoder(ByToken),
    "another function of the logits": decoder(Shifted),
    "a narrower dtype on the way": decoder(Rounded),
    "log-softmax twice": decoder(nn.Linear, nll_of_two),
    "a loss that normalises nothing": decoder(nn.Linear, of_plain_nll),
    "classes in the middle": decoder(nn.Linear, transposed),
    "a penalty on the logits": decoder(nn.Linear, with_penalty),
    "class weights": decoder(nn.Linear, weighted),
    "smoothed labels": decoder(nn.Linear, smoothed),
}


def assert_scored(model: Decoder, gradient_of: str, tol: float = 1e-9) -> None:
    """The full loss and the gradient of every token are those of autograd."""
    how = {"scorer": "gradient", "report_loss": "full", "logits": "drop"}
    run = executed(model, tokens(), gradient_of=gradient_of, **how)
    eager, seen = copy.deepcopy(model), Watch()
    module = eager.head if gradient_of == "head" else eager.layers[-1]
    module.register_forward_pre_hook(seen.catch, with_kwargs=True)
    loss = eager(**tokens())
    close(run.selection.gradient, torch.autograd.grad(loss, seen.z)[0].abs().sum(-1), tol)
    close(run.loss.detach(), loss.detach(), tol)


@pytest.mark.parametrize("gradient_of", ["last_block", "head"])
@pytest.mark.parametrize("name", FOUND)
def test_a_linear_head_is_one_operator(name, gradient_of, heads):
    assert_scored(FOUND[name], gradient_of)
    assert heads and all(heads)


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_go_through_chunks(name, heads):
    assert_scored(OTHERS[name], "last_block", 1e-5 if name == "a narrower dtype on the way" else 1e-9)
    assert not any(heads)
