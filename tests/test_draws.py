"""The result of a random operation is one draw, also in values without gradient that are computed from it.

Every loss is identically 0 for any draw, of all tokens and of the kept ones.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from compare import compiled, loss_of
from marks import slow
from test_backend import Model, compile_eager, data
from torch import Tensor


def by_mask(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    x = F.dropout(x, 0.5)
    return (torch.where(x > 0, x, 0.0) - F.relu(x)).square().sum() + (x * (x != 0) - x).square().sum()


def by_experts(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """As a mixture of experts, gathers probabilities by the indices of the largest."""
    shares = model.lm_head(F.dropout(x, 0.5)).softmax(-1)
    largest, numbers = shares.topk(2)
    return (shares.gather(-1, numbers) - largest).square().sum()


def straight_through(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """Rounded to whole numbers in forward, not in backward."""
    x = F.dropout(x * 5, 0.5)
    whole = x + (x.round() - x).detach()
    return (torch.cos(2 * torch.pi * whole) - 1).square().sum()


def under_no_grad(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    x = F.dropout(x, 0.5)
    with torch.no_grad():
        largest = x.abs().amax(-1, keepdim=True)
    return F.relu(x.abs() - largest).square().sum()


LOSSES = [by_mask, by_experts, straight_through, under_no_grad]


@pytest.mark.parametrize("loss", LOSSES)
def test_values_without_gradient_belong_to_the_draw_of_their_stream(loss):
    run = compiled(Model(loss, dropout=0.3), data(), inner="eager", report_loss="kept")
    assert abs(run.loss.item()) < 1e-20


@pytest.mark.parametrize(
    ("inner", "recompute"), [("aot_eager", "none"), ("aot_eager", "rows"), slow("inductor", "rows")]
)
def test_they_do_after_compilation(inner, recompute):
    """All losses in one model: each is a sum of squares, so their sum is 0 only if each is."""
    model = Model(lambda *given: sum(loss(*given) for loss in LOSSES), dropout=0.3)
    run = compiled(model, data(), inner=inner, report_loss="kept", recompute=recompute)
    assert abs(run.loss.item()) < 1e-20


def test_the_gradient_is_that_of_plain_training_in_expectation():
    """x (x != 0) is x: with the mask of another draw, half of it would be lost."""

    def linear(model: Model, x: Tensor, labels: Tensor) -> Tensor:
        x = F.dropout(x, 0.5)
        return (x * (x != 0) * model.lm_head.weight[0]).sum()

    model = Model(linear, layers=1)
    step = compile_eager(model, scorer="strided", strict=True)
    for _ in range(200):
        step(**data()).backward()
    found = model.lm_head.weight.grad[0] / 200
    plain = Model(lambda model, x, labels: (x * model.lm_head.weight[0]).sum(), layers=1)
    compile_eager(plain, scorer="strided", strict=True)(**data()).backward()
    expected = plain.lm_head.weight.grad[0]
    share = (found @ expected / (expected @ expected)).item()
    assert share == pytest.approx(1, abs=0.1)  # the mean of 200 draws of 120 entries has an error of 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_mixture_of_experts_after_dropout_trains(name):
    """Experts are chosen from the same draw as their tokens."""
    model, batch = build(name, "sdpa", 24, torch.float32)
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    run = compiled(model, batch)
    assert loss_of(run.output).isfinite() and all(grad.isfinite().all() for grad in run.grads.values())
