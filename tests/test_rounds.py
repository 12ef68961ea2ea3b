"""Rounds: the gradient of the kept rows, a few rows at a time, is that of all of them at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from architectures import build
from compare import Run, by_reference, error, grads_of, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from test_random import RELAXED, Transformer, batches, configurations
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import tokenseek_fx
from tokenseek_fx import Config, GraphNotSupported, TokenSeekWarning, selecting

B, T, V, D = 3, 13, 31, 8
OPTIONS = {"inner": "eager", "strict": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def train(model: nn.Module, batch: dict[str, Any], rows: Tensor | None = None, **options: Any) -> Run:
    """One step of a copy, on given rows or on those that it chooses."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    step = torch.compile(model, backend="tokenseek", options={**OPTIONS, **options})
    with tokenseek_fx.record() as rec:
        if rows is None:
            output = step(**batch)
        else:
            with selecting(rows):
                output = step(**batch)
    loss_of(output).backward()
    return Run(output, grads_of(model), rec[0].indices, rec[0])


def plain(model: nn.Module, batch: dict[str, Any]) -> Run:
    model = copy.deepcopy(model)
    output = model(**batch)
    loss_of(output).backward()
    return Run(output, grads_of(model), torch.empty(0))


def rows_of(k: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(B, T, generator=draw).argsort(-1)[:, :k].sort(-1).values


def decoder(name: str = "llama", attn: str = "sdpa", padding: str | None = "right") -> tuple[nn.Module, dict[str, Any]]:
    model = zoo.build(name, attn).double()
    return model, zoo.batch(model, B, T, padding=padding)


# -- decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [2, 4, 13, 20])
def test_all_rows_are_plain_training(rounds):
    """Also rounds of unequal size, and more rounds than rows."""
    model, batch = decoder()
    run = train(model, batch, keep_ratio=1, rounds=rounds)
    assert error(run.grads, plain(model, batch).grads) < 1e-9
    assert abs(run.loss - plain(model, batch).loss) < 1e-6  # transformers computes it in float32


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize(
    ("name", "attn"), [("llama", "sdpa"), ("gpt2", "eager"), slow("mistral", "sdpa"), slow("gemma2", "eager")]
)
def test_chosen_rows_have_the_gradient_of_the_reference(name, attn, rounds):
    model, batch = decoder(name, attn)
    run = train(model, batch, keep_ratio=0.5, scorer="loss", rounds=rounds)
    assert run.selection is not None
    expected = by_reference(model, batch, run.indices, T, run.selection.weights)
    assert error(run.grads, expected.grads) < 1e-6


@settings(max_examples=8, **RELAXED)
@given(configurations(), batches(), st.floats(0.1, 1.0), st.integers(2, 20))
def test_random_decoders_have_the_gradient_of_the_reference(configuration, batch, ratio, rounds):
    model = Transformer(configuration)
    run = train(model, batch, keep_ratio=ratio, scorer="random", rounds=rounds)
    assert error(run.grads, by_reference(model, batch, run.indices).grads) < 1e-9


@pytest.mark.parametrize("weighted", [False, True])
def test_given_rows(weighted):
    model, batch = decoder()
    rows = rows_of(7)
    weights = torch.rand(B, 7, dtype=torch.float64) + 0.5 if weighted else None
    twin = copy.deepcopy(model)
    step = torch.compile(twin, backend="tokenseek", options={**OPTIONS, "rounds": 3})
    with selecting(rows, weights):
        loss_of(step(**batch)).backward()
    assert error(grads_of(twin), by_reference(model, batch, rows, T, weights).grads) < 1e-6


def test_a_round_is_not_the_whole():
    """The comparison can fail: without what later rounds send, the gradient is another one."""
    model, batch = decoder()
    rows = rows_of(8)
    whole = by_reference(model, batch, rows, T).grads
    halves = [by_reference(model, batch, rows[:, part], T).grads for part in (slice(0, 4), slice(4, 8))]
    assert error({name: (halves[0][name] + halves[1][name]) / 2 for name in whole}, whole) > 1e-3


# -- losses -----------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """One causal attention and a loss ``of(model, hidden, labels)``."""

    def __init__(self, of: Any, causal: bool = True) -> None:
        super().__init__()
        self.of, self.causal = of, causal
        self.embed, self.qkv, self.out, self.head = (
            nn.Embedding(V, D),
            nn.Linear(D, 3 * D),
            nn.Linear(D, D),
            nn.Linear(D, V),
        )
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(2):
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, 0]).tanh()
        return self.of(self, x, labels)


def toy(of: Any, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(V, (B, T))
    labels = torch.where(torch.rand(B, T) < 0.6, ids.roll(-1, 1), -100)
    return Toy(of, **options).double(), {"ids": ids, "labels": labels}


def _labels(reduction: str) -> Any:
    return lambda m, x, y: F.cross_entropy(m.head(x).flatten(0, 1), y.flatten(), reduction=reduction)


LOSSES = {
    "mean": _labels("mean"),
    "sum": _labels("sum"),
    "scaled": lambda m, x, y: m.scale * _labels("sum")(m, x, y) / 7,
    "class weights": lambda m, x, y: F.cross_entropy(
        m.head(x).flatten(0, 1), y.flatten(), torch.linspace(1, 2, V, dtype=x.dtype)
    ),
    "two": lambda m, x, y: _labels("mean")(m, x, y) + 0.3 * F.mse_loss(m.out(x), x.detach()),
    "elementwise mean": lambda m, x, y: F.mse_loss(m.out(x), x.detach().roll(1, 0)),
    "elementwise sum": lambda m, x, y: F.l1_loss(m.out(x), x.detach().roll(1, 0), reduction="sum"),
    "unreduced": lambda m, x, y: (
        F.cross_entropy(m.head(x).mT, y, reduction="none").sum() / (y != -100).sum()
    ),
    "a convolution before": lambda m, x, y: _labels("mean")(m, m.out(x).cumsum(1), y),
    "mean of values": lambda m, x, y: m.head(x).square().mean() + m.out(x).square().mean((0, 1)).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    model, batch = toy(LOSSES[name])
    for kept in (6, T):
        run = train(
            model, batch, keep_tokens=kept, scorer="random", rounds=3, **({} if kept < T else {"logits": "keep"})
        )
        assert error(run.grads, by_reference(model, batch, run.indices, T).grads) < 1e-9


NOT_SUMS = {
    "squared": lambda m, x, y: _labels("mean")(m, x, y) ** 2,
    "parameters": lambda m, x, y: _labels("mean")(m, x, y) + m.head.weight.square().sum(),
    "product": lambda m, x, y: _labels("mean")(m, x, y) * F.mse_loss(m.out(x), x.detach()),
    "pooled": lambda m, x, y: _labels("mean")(m, x - x.mean(1, keepdim=True), y),
    "shifted": lambda m, x, y: _labels("mean")(m, x + m.out(x).roll(1, 1), y),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_SUMS)
def test_what_is_no_sum_over_rows_runs_in_one_round(name):
    model, batch = toy(NOT_SUMS[name])
    with pytest.raises(Exception, match="Use rounds=1") as caught:
        train(model, batch, keep_ratio=0.5, scorer="random", rounds=3)
    assert "RoundsNotSupported" in str(caught.value) or isinstance(caught.value, GraphNotSupported)
    torch._dynamo.reset()
    with pytest.warns(TokenSeekWarning, match=r"rounds=3: .* Compiled with one round"):
        run = train(model, batch, keep_ratio=0.5, scorer="random", rounds=3, strict=False)
    assert error(run.grads, by_reference(model, batch, run.indices, T).grads) < 1e-9


def test_attention_in_both_directions_runs_in_one_round():
    model, batch = toy(LOSSES["mean"], causal=False)
    with pytest.warns(TokenSeekWarning, match="Attention in both directions"):
        run = train(model, batch, keep_ratio=1, rounds=3, strict=False)
    assert error(run.grads, plain(model, batch).grads) < 1e-9


def test_a_loss_outside_of_the_model():
    model, batch = toy(lambda m, x, y: m.head(x))
    weights, grads = torch.randn(B, T, V, dtype=torch.float64), []
    for options in ({"rounds": 1}, {"rounds": 3}):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        step = torch.compile(
            twin, backend="tokenseek", options={**OPTIONS, "scorer": "strided", "keep_ratio": 0.5, **options}
        )
        (step(**batch) * weights).sum().backward()
        grads.append(grads_of(twin))
    assert error(grads[1], grads[0]) < 1e-9


# -- encoder-decoders, experts, adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("rounds", [2, 5])
def test_an_encoder_runs_after_the_rounds_of_its_decoder(name, rounds):
    model, batch = build(name, "sdpa", T)
    run = train(model, batch, keep_ratio=[0.5, 0.4], scorer="attention", rounds=rounds)
    assert run.selection is not None
    expected = by_reference(model, batch, run.indices, T, run.selection.weights, others=run.selection.others)
    assert error(run.grads, expected.grads) < 1e-6


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts(name):
    model, batch = build(name, "sdpa" if name == "qwen3_moe" else "eager", T, torch.float32)
    run = train(model, batch, keep_ratio=0.6, scorer="random", rounds=3)
    assert error(run.grads, by_reference(model, batch, run.indices, T).grads) < 1e-5


def test_adapters():
    model, batch = decoder()
    model = zoo.lora(model)
    run = train(model, batch, keep_ratio=1, rounds=4)
    assert error(run.grads, plain(model, batch).grads) < 1e-6


# -- how autograd sees it ---------------------------------------------------------------------------------------------


def test_gradients_add_up_in_place_or_are_returned():
    """Into an existing gradient, by ``torch.autograd.grad``, and where a hook sees it."""
    model, batch = decoder()
    expected = plain(model, batch).grads
    step = torch.compile(model, backend="tokenseek", options={**OPTIONS, "keep_ratio": 1, "rounds": 3})
    loss_of(step(**batch)).backward()
    places = {name: p.grad.data_ptr() for name, p in model.named_parameters()}
    seen: list[Tensor] = []
    hook = model.lm_head.weight.register_hook(seen.append)
    loss_of(step(**batch)).backward()
    assert error({name: g / 2 for name, g in grads_of(model).items()}, expected) < 1e-6
    assert {
        name: p.grad.data_ptr() for name, p in model.named_parameters() if name != "lm_head.weight"
    }.items() <= places.items()
    assert error({"lm_head.weight": seen[0]}, {"lm_head.weight": expected["lm_head.weight"]}) < 1e-6
    hook.remove()
    names = [name for name, _ in model.named_parameters()]
    found = dict(zip(names, torch.autograd.grad(loss_of(step(**batch)), [*model.parameters()]), strict=True))
    assert error(found, expected) < 1e-6
    assert error({name: g / 2 for name, g in grads_of(model).items()}, expected) < 1e-6, "they were not added to"


def test_a_second_backward_is_refused_as_usual_or_right():
    model, batch = decoder()
    step = torch.compile(model, backend="tokenseek", options={**OPTIONS, "keep_ratio": 1, "rounds": 2})
    loss = loss_of(step(**batch))
    loss.backward(retain_graph=True)
    loss.backward()
    assert error({name: g / 2 for name, g in grads_of(model).items()}, plain(model, batch).grads) < 1e-6
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dynamic", [None, True])
def test_lengths_that_change(dynamic):
    """With ``dynamic=True`` also the floats of the model are inputs of Dynamo's graph."""
    model, _ = decoder()
    options = {**OPTIONS, "inner": "aot_eager", "keep_ratio": 1, "rounds": 3}
    step = torch.compile(model, backend="tokenseek", dynamic=dynamic, options=options)
    for length in (13, 9, 13, 24):
        batch = zoo.batch(model, 2, length)
        model.zero_grad()
        loss_of(step(**batch)).backward()
        assert error(grads_of(model), plain(model, batch).grads) < 1e-6


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_compiled(inner):
    model, batch = decoder()
    run = train(model, batch, keep_ratio=0.8, scorer="random", rounds=3, inner=inner)
    assert error(run.grads, by_reference(model, batch, run.indices, T).grads) < 1e-6


def test_nothing_but_keys_and_values_is_saved_for_all_tokens():
    """Between forward and backward: inputs, keys and values, and what has one number a token."""
    model, batch = decoder(padding=None)
    step = torch.compile(
        model, backend="tokenseek", options={**OPTIONS, "keep_ratio": 1, "rounds": 4, "logits": "drop"}
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        loss_of(step(**batch))
    config = model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    known = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = [x for x in saved if not isinstance(x, FakeTensor)]
    wide = [x for x in saved if x.data_ptr() not in known and x.is_floating_point() and x.numel() > B * T * width]
    assert not wide, [x.shape for x in wide]
    assert sum(x.numel() == B * T * width for x in saved) == 2 * config.num_hidden_layers


def test_options():
    for rounds in (0, -1, 1.5, True, "two"):
        with pytest.raises(tokenseek_fx.ConfigError, match="rounds"):
            Config(rounds=rounds)
    with pytest.raises(tokenseek_fx.ConfigError, match="report_loss='kept' has no effect"):
        Config(rounds=2, report_loss="kept")
    with pytest.raises(tokenseek_fx.ConfigError, match="kv='fp8' has no effect"):
        Config(rounds=2, kv="fp8")
    with pytest.raises(tokenseek_fx.ConfigError, match="mode='reduce-overhead' has no effect"):
        Config(rounds=2, mode="reduce-overhead")
    with pytest.raises(tokenseek_fx.ConfigError, match="rounds=2 has no effect"):
        Config(rounds=2, kv_grad="all")
