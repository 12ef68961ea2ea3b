"""A custom operation: a barrier by default, restricted to the selected rows with an axes rule of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import by_reference, compiled, error
from torch import Tensor, nn

from tokenseek_fx.passes.graph.program import Program
from tokenseek_fx.passes.rules.axes import along, elementwise, formula
from tokenseek_fx.passes.rules.op import AXES_RULES, AxesRule, axes_rule
from tokenseek_fx.passes.streams.trace import Rewrite, TraceStreams

B, T, D, HEADS = 3, 10, 8, 2


@torch.library.custom_op("tokenseek_test::gate", mutates_args=())
def gate(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) y."""
    return F.silu(x) * y


@gate.register_fake
def _(x, y):
    return torch.empty_like(x)


def _gate_backward(ctx, grad):
    x, y = ctx.saved_tensors
    s = torch.sigmoid(x)
    return grad * y * s * (1 + x * (1 - s)), grad * F.silu(x)


gate.register_autograd(_gate_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.library.custom_op("tokenseek_test::mix", mutates_args=())
def mix(x: Tensor, w: Tensor, dim: int) -> Tensor:
    """x W, then normalised along the features ``dim``."""
    return torch.softmax(x @ w, dim)


@mix.register_fake
def _(x, w, dim):
    return x.new_empty(*x.shape[:-1], w.shape[1])


def _mix_setup(ctx, inputs, output):
    x, w, ctx.dim = inputs
    ctx.save_for_backward(x, w, output)


def _mix_backward(ctx, grad):
    x, w, y = ctx.saved_tensors
    z = y * (grad - (grad * y).sum(ctx.dim, keepdim=True))
    return z @ w.t(), x.flatten(0, -2).t() @ z.flatten(0, -2), None


mix.register_autograd(_mix_backward, setup_context=_mix_setup)


@torch.library.custom_op("tokenseek_test::running_sum", mutates_args=())
def running_sum(x: Tensor, dim: int) -> Tensor:
    return x.cumsum(dim)


@running_sum.register_fake
def _(x, dim):
    return torch.empty_like(x)


def _keep_dim(ctx, inputs, output):
    ctx.dim = inputs[1]


running_sum.register_autograd(
    lambda ctx, grad: (grad.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim), None), setup_context=_keep_dim
)


class Transformer(nn.Module):
    """Two blocks of attention and a feed-forward with the custom operation, on [B, T, D]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))
        self.head = nn.Linear(D, 1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(self.head(x).squeeze(-1), target)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.gate, self.down = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.mixing = nn.Parameter(torch.randn(2 * D, 2 * D) / D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(B, T, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.down(self.custom(self.up(x), self.gate(x)))

    def custom(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "gate":
            return gate(x, y)
        if self.kind == "mix":
            return mix(x, self.mixing, -1) * y
        return running_sum(x, -1 if self.kind == "features" else 1) * y


#: The custom operation and its rule.
KINDS: dict[str, tuple[Any, AxesRule]] = {
    "gate": (gate, elementwise),
    "mix": (mix, formula("... i, i o -> ... o")),
    "features": (running_sum, along("dim")),
    "tokens": (running_sum, along("dim")),
}
OPTIONS = {"inner": "aot_eager", "keep_ratio": 0.4, "strict": True}


def name(kind: str) -> str:
    return str(KINDS[kind][0]._opoverload)


@contextmanager
def registered(kind: str, rule: AxesRule | None = None) -> Iterator[None]:
    """The rule of the custom operation, registered during a test."""
    op = KINDS[kind][0]._opoverload
    axes_rule(op, rule=rule or KINDS[kind][1])
    try:
        yield
    finally:
        del AXES_RULES[op]


def model_and_batch(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Transformer(kind).double()
    return model, {"x": torch.randn(B, T, D).double(), "target": torch.randn(B, T).double()}


@pytest.fixture
def barriers(monkeypatch) -> list[str]:
    """The operations that run over all tokens in the graphs that the test compiles."""
    found: list[str] = []
    run = TraceStreams.run

    def spy(self: TraceStreams, program: Program) -> Program:
        program = run(self, program)
        found.extend(str(barrier.node.target) for barrier in program[Rewrite].barriers)
        return program

    monkeypatch.setattr(TraceStreams, "run", spy)
    return found


def gradient_error(kind: str) -> float:
    """The error of the compiled model against the eager definition, relative to the largest gradient."""
    model, batch = model_and_batch(kind)
    run = compiled(model, batch, **OPTIONS)
    assert run.indices.shape == (B, 4)
    return error(run.grads, by_reference(model, batch, run.indices, length=T).grads)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_rule_it_is_a_barrier_and_exact(kind, barriers):
    assert gradient_error(kind) < 1e-9
    assert barriers == [name(kind)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_rule_it_runs_on_the_selected_rows_and_is_exact(kind, barriers):
    with registered(kind):
        assert gradient_error(kind) < 1e-9
    assert barriers == ([name(kind)] * 2 if kind == "tokens" else [])


def test_a_wrong_rule_is_caught_by_the_comparison():
    """If a running sum over tokens were declared elementwise, the gradient would differ."""
    with registered("tokens", elementwise):
        assert gradient_error("tokens") > 1e-3


def test_no_rule_remains():
    assert not [op for op in AXES_RULES if "tokenseek_test" in str(op)]
