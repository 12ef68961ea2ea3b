"""Eager attention in models: where it is recognised, values and gradients are the same without scores of all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import architectures
import pytest
import torch
import zoo
from captured import captured
from compare import assert_matches
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from test_scores import assert_scores
from test_size import graphs, shapes  # noqa: F401 (a fixture)
from torch import Tensor, nn

from tokenseek_fx.passes.analysis.token_axes import TokenAxes
from tokenseek_fx.passes.attention.positional import PositionalAttentions

B, T, HEADS, E, VOCAB = 3, 13, 4, 4, 11
LEAST = torch.finfo(torch.float64).min
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def order(seen: Tensor) -> Tensor:
    n = torch.arange(T, device=seen.device)
    return n <= n[:, None]


def causal(scores: Tensor, seen: Tensor) -> Tensor:
    return scores + torch.where(order(seen), 0.0, -torch.inf)


def causal_of_keys(scores: Tensor, seen: Tensor) -> Tensor:
    return scores + torch.where(order(seen) & seen[:, None, None], torch.zeros((), dtype=scores.dtype), LEAST)


def window_of_keys(scores: Tensor, seen: Tensor) -> Tensor:
    n = torch.arange(T, device=seen.device)
    return scores.masked_fill(~(order(seen) & (n[:, None] - n < 4) & seen[:, None, None]), LEAST)


def near_keys(scores: Tensor, seen: Tensor) -> Tensor:
    """A window on both sides."""
    n = torch.arange(T, device=seen.device)
    near = (n[:, None] - n).abs() < 3
    return scores + torch.where(near & seen[:, None, None], torch.zeros((), dtype=scores.dtype), LEAST)


def filled(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~order(seen), -torch.inf)


def keys(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen[:, None, None].expand(scores.shape), LEAST)


def sloped(scores: Tensor, seen: Tensor) -> Tensor:
    """A bias by head and key, and a float mask that is converted to bool."""
    bias = torch.arange(1, HEADS + 1)[:, None, None] * torch.arange(1 - T, 1) / 8
    hidden = torch.where(order(seen) & seen[:, None, None], torch.zeros((), dtype=scores.dtype), LEAST).to(torch.bool)
    return (scores + bias).masked_fill(hidden, LEAST)


def of_keys(scores: Tensor, seen: Tensor) -> Tensor:
    return scores + torch.where(seen, torch.zeros((), dtype=scores.dtype), LEAST)[:, None, None]


def least_of_keys(scores: Tensor, seen: Tensor) -> Tensor:
    """A number for every key, which isn't known to be 0 or the minimum."""
    return scores + (1 - seen[:, None, None].to(scores.dtype)) * LEAST


def unmasked(scores: Tensor, seen: Tensor) -> Tensor:
    return scores


MASKS = [unmasked, causal, causal_of_keys, window_of_keys, near_keys, filled, keys, of_keys, least_of_keys, sloped]
SCALES = {
    "times": lambda q, k: q @ k.transpose(2, 3) * E**-0.5,
    "over": lambda q, k: torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(E),
    "before": lambda q, k: (q * E**-0.5) @ k.transpose(-2, -1),
    "none": lambda q, k: q @ k.mT,
}
CAPS = {
    "none": lambda s: s,
    "cap": lambda s: torch.tanh(s / 2.0) * 2.0,
    "times": lambda s: 3.0 * torch.tanh(s * 0.5),
}


class Attention(nn.Module):
    """``groups`` query heads share a key head."""

    def __init__(self, mask, scale: str, cap: str, groups: int, sinks: bool) -> None:
        super().__init__()
        self.mask, self.scale, self.cap, self.groups = mask, SCALES[scale], CAPS[cap], groups
        self.qkv = nn.ModuleList(nn.Linear(HEADS * E, heads * E) for heads in (HEADS, HEADS // groups, HEADS // groups))
        self.sinks = nn.Parameter(torch.zeros(HEADS)) if sinks else None
        self.out = nn.Linear(HEADS * E, HEADS * E)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, E)).transpose(1, 2) for layer in self.qkv)
        if self.groups > 1:
            k, v = (t[:, :, None].expand(-1, -1, self.groups, -1, -1).reshape(q.shape) for t in (k, v))
        return self.out(self.product(self.weights(q, k, seen), v).transpose(1, 2).flatten(2))

    def product(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights @ v

    def weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        scores = self.mask(self.cap(self.scale(q, k)), seen)
        if self.sinks is None:
            return scores.softmax(-1)
        scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(len(q), -1, q.shape[2], -1)], -1)
        return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1]


class Model(nn.Module):
    def __init__(self, mask=causal, scale="times", cap="none", groups=1, sinks=False, attention=Attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(VOCAB, HEADS * E), nn.Linear(HEADS * E, VOCAB)
        self.blocks = nn.ModuleList(attention(mask, scale, cap, groups, sinks) for _ in range(2))
        zoo.with_large_weights(self).double()

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block(x, seen)
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=zoo.IGNORED)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def data() -> dict[str, Tensor]:
    """The first instance is padded on the left: its first queries are fully masked."""
    ids = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))
    seen = torch.arange(T) >= torch.tensor([[3], [0], [1]])
    return {"ids": ids, "seen": seen}


def by_position(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    """The number of attentions that are recognised, and of all attentions."""
    program = captured(model, batch).program
    return len(program[PositionalAttentions]), len(program[TokenAxes].attentions)


every_form = given(
    mask=st.sampled_from(MASKS),
    scale=st.sampled_from([*SCALES]),
    cap=st.sampled_from([*CAPS]),
    groups=st.sampled_from([1, 2]),
    sinks=st.booleans(),
    scorer=st.sampled_from(["random", "tokenseek"]),
)


def assert_form_matches(mask, scale, cap, groups, sinks, scorer):
    if sinks and mask is filled:
        mask = causal
    model = Model(mask, scale, cap, groups, sinks)
    assert by_position(model, data()) == (2, 2)
    if scorer == "random":
        assert_matches(model, data(), 1e-9, length=T, scorer=scorer, select="topk")
    else:
        assert_scores(model, data(), 1e-9, "blocks", "head", length=T, attention_layers="all", gradient_of="head")


@every_form
@settings(max_examples=8, deadline=None)
def test_recognised_forms_match_the_reference(**form):
    assert_form_matches(**form)


@pytest.mark.slow
@every_form
@settings(max_examples=25, deadline=None)
def test_more_forms_match_the_reference(**form):
    assert_form_matches(**form)


@pytest.mark.parametrize("report", ["full", slow("kept")])
@pytest.mark.parametrize("mask", [causal_of_keys, keys, of_keys, least_of_keys, window_of_keys, near_keys, sloped])
def test_fully_masked_queries_attend_to_all_keys_equally(mask, report):
    """Their losses count, and with so many kept rows, rows of padding are kept.

    They give gradient to values, and to scores that have a mask added. The second instance has no key at all; the third
    ends in more padding than the width of a window.
    """
    model, options = Model(mask, cap="cap", groups=2), {"keep_ratio": None, "keep_tokens": T - 1}
    batch = data()
    batch["seen"][1], batch["seen"][2, 6:] = False, False
    run = assert_matches(model, batch, 1e-9, length=T, scorer="random", report_loss=report, **options)
    assert (run.indices[0] < 3).sum() == 2, "of the first instance's three tokens of padding"


@pytest.mark.parametrize(
    ("kv_grad", "options"),
    [
        ("all", {"chunk_bytes": 1500}),
        ("selected", {"chunk_bytes": 1500}),
        slow("all", {"recompute": "rows", "inner": "inductor"}),
        ("selected", {"recompute": "rows"}),  # by Inductor: Gemma 2 in `test_models`
    ],
)
def test_through_chunks_and_blocks(kv_grad, options):
    model = Model(window_of_keys, cap="cap", groups=2, sinks=True)
    blocks = "blocks" if kv_grad == "all" else None
    assert_matches(model, data(), 1e-9, length=T, open_blocks=blocks, scorer="tokenseek", kv_grad=kv_grad, **options)


# -- attention that is left unchanged ---------------------------------------------------------------------------------


class Narrow(Attention):
    """Its softmax is less precise than its products."""

    def weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        return self.mask(self.scale(q, k), seen).softmax(-1, dtype=torch.float32).to(q.dtype)


class Dropped(Attention):
    def weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        return nn.functional.dropout(super().weights(q, k, seen), 0.5)


class Twice(Attention):
    """Two products read its attention weights."""

    def product(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights @ v + weights @ v.square()


class Biased(Attention):
    """The bias of its keys is trained."""

    def __init__(self, *form) -> None:
        super().__init__(*form)
        self.slope = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        bias = self.slope * torch.arange(T, device=q.device)
        return self.mask(self.scale(q, k) + bias, seen).softmax(-1)


class Negative(Attention):
    """An added number is not a mask, and the cap is negative."""

    def weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        return self.mask((self.scale(q, k).tanh() * -2.0) + 1.0, seen).softmax(-1)


class Late(Attention):
    """The scale comes after the mask."""

    def weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        return (self.mask(self.scale(q, k), seen) * 0.5).softmax(-1)


def infinite(scores: Tensor, seen: Tensor) -> Tensor:
    """A fully masked query is NaN (so here every query sees the first key)."""
    hidden = ~(order(seen) & (seen | (torch.arange(T) == 0))[:, None, None])
    return scores.masked_fill(hidden, -torch.inf)


def weak(scores: Tensor, seen: Tensor) -> Tensor:
    """Hidden keys keep some weight."""
    return scores + torch.where(order(seen), torch.zeros((), dtype=scores.dtype), -3.0)


def by_pair(scores: Tensor, seen: Tensor) -> Tensor:
    n = torch.arange(T, device=seen.device)
    return causal(scores - (n - n[:, None]).abs() / 8, seen)


def added_twice(scores: Tensor, seen: Tensor) -> Tensor:
    """A key hidden by both masks is hidden from fully masked queries too."""
    none = torch.zeros((), dtype=scores.dtype)
    return scores + torch.where(order(seen), none, LEAST) + torch.where(seen[:, None, None], none, LEAST)


def added_and_filled(scores: Tensor, seen: Tensor) -> Tensor:
    return filled(scores + torch.where(seen[:, None, None], torch.zeros((), dtype=scores.dtype), LEAST), seen)


LEFT = [(causal, Narrow), (causal, Twice), (causal, Biased), (causal, Late), (causal, Negative)]
LEFT += [(infinite, Attention), (weak, Attention), (by_pair, Attention)]
LEFT += [(added_twice, Attention), (added_and_filled, Attention)]


@pytest.mark.parametrize(("mask", "attention"), LEFT, ids=lambda x: x.__name__)
def test_other_forms_run_unchanged(mask, attention):
    model = Model(mask, attention=attention)
    assert by_position(model, data()) == (0, 2)
    assert_matches(model, data(), 1e-6 if attention is Narrow else 1e-9, length=T, scorer="random")


def test_dropout_of_attention_weights_is_left_to_the_model():
    assert by_position(Model(attention=Dropped), data()) == (0, 2)


# -- models -----------------------------------------------------------------------------------------------------------

build = cache(zoo.build)  # one model for all tests, so that its graph is captured once for each form of the batch


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("scorer", ["random", "tokenseek"])
@pytest.mark.parametrize("name", ["gemma2", slow("qwen2")])
def test_models_match_the_reference(name, scorer, padding):
    """Soft caps and windows of Gemma 2."""
    model = build(name, attn="eager", dtype=torch.float32)
    batch = zoo.batch(model, 5, 23, padding)
    assert by_position(model, batch) == (2, 2)
    assert_matches(model, batch, 2e-4, length=23, scorer=scorer, select="topk")


@pytest.mark.parametrize("name", ["gpt_oss", "mpt"])
def test_sinks_and_slopes_of_models_match_the_reference(name):
    model, batch = architectures.build(name, "eager", 23, torch.float32)
    assert by_position(model, batch) == (2, 2)
    assert_matches(model, batch, 2e-4, length=23, scorer="tokenseek", select="topk")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mpt", "modernbert mlm"])
def test_no_value_has_both_queries_and_keys(graphs, name, padded):  # noqa: F811
    tokens, kept = 521, 53
    torch._dynamo.reset()
    model, batch = architectures.build(name, "eager", tokens, torch.float32)
    if padded:
        batch["attention_mask"] = (torch.arange(tokens) >= torch.arange(len(batch["labels"]))[:, None]).long()
    options = {"logits": "drop", "strict": True, "keep_tokens": kept, "keep_ratio": None}
    torch.compile(model, backend="tokenseek", options=options)(**batch).loss.backward()
    found = {*shapes(graphs)}
    assert any(tokens in shape for shape in found)
    assert not [shape for shape in found if shape.count(tokens) > 1 or {kept, tokens} <= {*shape}]
