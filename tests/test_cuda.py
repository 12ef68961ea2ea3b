"""On a CUDA device, with Inductor and the Triton kernels: the laws of the CPU, and memory as PyTorch counts it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from architectures import build
from compare import assert_matches, by_reference, compiled, error, loss_of
from marks import needs_cuda
from torch import nn

import tokenseek_fx

pytestmark = needs_cuda

KERNELS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("gpt2", "sdpa"),
    ("gemma2", "eager"),
    ("mistral", "sdpa"),
    ("bert mlm", "sdpa"),
    ("t5", "eager"),
    ("vit", "sdpa"),
    ("qwen3_moe", "sdpa"),
]


def on_cuda(model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    return model.cuda(), {name: x.cuda() if torch.is_tensor(x) else x for name, x in batch.items()}


def llama(dtype: torch.dtype = torch.float32, tokens: int = 192) -> tuple[nn.Module, dict[str, Any]]:
    """Two query heads per key head, heads of 64, and labels on two thirds of the tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(1000, (3, tokens))
    labels = torch.where(torch.rand(3, tokens) < 0.67, ids, -100)
    return on_cuda(transformers.LlamaForCausalLM(config).to(dtype).train(), {"input_ids": ids, "labels": labels})


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Convolutions in full float32: tf32 has 10 bits. (Matrix products are in full float32 by default.)"""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize(("name", "attn"), KERNELS)
def test_architectures_equal_the_reference(name, attn):
    """In float32, which the kernels support; the tolerance is that of sums in another order."""
    model, batch = on_cuda(*build(name, attn, 45, torch.float32))
    run = compiled(model, batch, report_loss="kept", inner="inductor")
    chosen = run.selection
    expected = by_reference(model, batch, run.indices, chosen.scores.shape[1], others=chosen.others)
    torch.testing.assert_close(run.loss.detach(), expected.loss.detach(), rtol=2e-5, atol=1e-6)
    assert error(run.grads, expected.grads) <= 5e-5


@pytest.mark.parametrize(
    "options",
    [
        {"scorer": "tokenseek"},
        {"scorer": "loss", "logits": "drop"},
        {"scorer": "gradient", "logits": "drop", "recompute": "none"},
        {"scorer": "attention", "recompute": "rows", "kv_grad": "all"},
        {"kv": "offload"},
        {"kv": "offload", "recompute": "rows", "logits": "drop"},
        {"kv": "recompute", "logits": "drop", "strict": False},
        {"mode": "reduce-overhead"},
        {"keep_ratio": 1.0},
    ],
    ids=str,
)
def test_options_equal_the_reference(options):
    open_blocks = "model.layers" if options.get("kv_grad") == "all" else None
    assert_matches(*llama(), 5e-5, open_blocks=open_blocks, **{"inner": "inductor", **options})


def test_bfloat16_is_as_near_as_the_reference_in_bfloat16():
    """Both round at different places; the tolerance is twice the reference's own distance from float32."""
    model, batch = llama(torch.bfloat16)
    run = compiled(model, batch, report_loss="kept", inner="inductor", scorer="tokenseek", logits="drop")
    narrow = by_reference(model, batch, run.indices).grads
    exact = by_reference(copy.deepcopy(model).float(), batch, run.indices).grads
    assert error(run.grads, exact) <= 2 * error(narrow, exact) < 0.1


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU that converts 8 bits",
)
def test_keys_and_values_in_8_bits_are_near():
    """e4m3 has 3 bits: an error of 2^-4 in each key and value; the loss is that of the exact forward."""
    model, batch = llama(torch.bfloat16)
    near = compiled(model, batch, report_loss="kept", inner="inductor", kv="fp8")
    exact = by_reference(copy.deepcopy(model).float(), batch, near.indices)
    torch.testing.assert_close(near.loss.float(), exact.loss, rtol=2e-2, atol=0)
    assert error(near.grads, exact.grads) < 0.15


def test_lengths_that_change():
    """Several lengths of one dynamic graph."""
    torch._dynamo.reset()
    model, _ = llama()
    options = {"scorer": "first", "keep_ratio": 0.3, "report_loss": "kept", "strict": True}
    run = torch.compile(copy.deepcopy(model), backend="tokenseek", options=options, dynamic=True)
    for tokens in (70, 100, 257):
        batch = llama(tokens=tokens)[1]
        run.zero_grad()
        with tokenseek_fx.record() as rec:
            loss = loss_of(run(**batch))
        loss.backward()
        expected = by_reference(model, batch, rec[0].indices)
        found = {name.removeprefix("_orig_mod."): p.grad for name, p in run.named_parameters()}
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
        assert error(found, expected.grads) <= 5e-5


def peak(step: Any) -> int:
    """Peak bytes allocated beyond those before, in the third of three steps."""
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
    return torch.cuda.max_memory_allocated() - before


def test_a_step_takes_less_memory():
    model, batch = llama(torch.bfloat16, 2048)

    def trains(run: nn.Module) -> Any:
        def step() -> None:
            run.zero_grad(set_to_none=False)
            run(**batch).loss.backward()

        return step

    plain = peak(trains(torch.compile(copy.deepcopy(model))))
    ours = peak(trains(torch.compile(model, backend="tokenseek", options={"keep_ratio": 0.1, "logits": "drop"})))
    assert ours < 0.3 * plain
