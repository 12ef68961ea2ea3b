"""What is kept for backward: values that are computed again there are the same, random ones are not computed again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from compare import assert_matches
from hypothesis import HealthCheck, given, settings
from test_random import RATIOS, Transformer, batches, configurations
from torch import Tensor, nn

import tokenseek_fx

RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
B, T, D, V = 2, 13, 12, 29


def draw(x: Tensor) -> Tensor:
    """A hidden layer times what several random operations give."""
    x = F.dropout(x, 0.5) * torch.rand_like(x) + x * torch.bernoulli(torch.full_like(x, 0.5))
    return x * torch.randn_like(x)


class Drawing(nn.Module):
    """Two blocks of causal attention (with dropout) and an MLP that draws."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.mixing = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(D, D) for _ in range(2)) for _ in range(2))
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for mixing, up, down in zip(self.mixing, self.up, self.down, strict=True):
            q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in mixing(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3).transpose(1, 2).flatten(2)
            x = x + down(draw(up(x).relu()))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "labels": ids}


@settings(max_examples=10, **RELAXED)
@given(configurations(), batches(), RATIOS)
def test_rows_that_are_computed_again_equal_the_reference(configuration, batch, ratio):
    assert_matches(Transformer(configuration), batch, 1e-9, keep_ratio=ratio, recompute="rows")


@pytest.mark.slow
@settings(max_examples=4, **RELAXED)
@given(configurations(), batches(), RATIOS)
def test_inductor_computes_rows_again_that_equal_the_reference(configuration, batch, ratio):
    assert_matches(Transformer(configuration), batch, 1e-6, keep_ratio=ratio, recompute="rows", inner="inductor")


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", ["none", "rows"])
def test_backward_sees_what_the_forward_drew(inner, recompute):
    """The slope of the loss by the last block's layers, for which keys and values are given, at one seed."""
    torch._dynamo.reset()
    model, batch = Drawing(), tokens()
    options = {"inner": inner, "keep_ratio": 0.4, "scorer": "first", "report_loss": "kept", "recompute": recompute}
    step = torch.compile(model, backend="tokenseek", options={**options, "strict": True})

    def loss() -> Tensor:
        torch.manual_seed(3)
        return step(**batch)

    loss().backward()
    weight, slope = model.up[-1].weight, 1e-6 * torch.randn(D, D, dtype=torch.float64)
    expected = 2 * (weight.grad * slope).sum()
    weight.data += slope
    above = loss()
    weight.data -= 2 * slope
    torch.testing.assert_close((above - loss()).detach(), expected, rtol=1e-4, atol=0)


# -- bytes --------------------------------------------------------------------------------------------------------------

LENGTH, WIDTH, INNER, WORDS = 128, 128, 384, 256
SIZES = {"vocab_size": WORDS, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2 = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": LENGTH}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(key_heads: int) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, **LLAMA, num_key_value_heads=key_heads)
    return transformers.LlamaForCausalLM(config).train()


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **GPT2, **DRY)).train()


MODELS = {"grouped heads": lambda: llama(2), "as many key heads": lambda: llama(4), "fused": gpt2}


def explained(model: nn.Module, **options) -> tokenseek_fx.Explanation:
    torch._dynamo.reset()
    ids = torch.randint(WORDS, (B, LENGTH), generator=torch.Generator().manual_seed(0))
    return tokenseek_fx.explain(model, input_ids=ids, labels=ids, options={"logits": "drop", **options})


@pytest.mark.parametrize("recompute", ["none", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_near_the_floor(name, recompute):
    report = explained(MODELS[name](), recompute=recompute)
    heads = 2 if name == "grouped heads" else 4
    assert report.rewritten.by_kind()["keys/values"] == 3 * 2 * B * LENGTH * heads * 32 * 4
    assert report.rewritten.bytes <= 1.15 * report.floor
    assert not report.rewritten.unexplained
    if recompute == "rows":
        assert report.floor == report.rewritten.by_kind()["keys/values"] + (3 + 1) * B * report.kept * WIDTH * 4
