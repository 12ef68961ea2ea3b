"""Attention in other words: spellings and layouts of the softmax, head mixing, and marked token axes.

Each is compared with the reference. The reference reads scores as [.., queries, keys], so a layout with keys first is
compared with the reference of the same mathematics with queries first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import captured
from compare import Run, by_reference, compiled, error, executed
from scores import Watch
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx import GraphNotSupported, TokenSeekWarning
from tokenseek_fx.passes.attention.positional import PositionalAttentions

D, H, E, V = 24, 4, 6, 37
SIZES = [(3, 7), (5, 13)]
Attend = Callable[["Block", Tensor, Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A block whose attention is ``attend(block, q, k, v, hidden)``, with q, k, v [B, T, H, E]."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.mix = nn.Parameter(torch.eye(H) + 0.3 * torch.randn(H, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, H, E).unbind(2)
        positions = torch.arange(x.shape[1])
        hidden = positions > positions[:, None]
        x = x + self.out(self.attend(self, 2 * q / math.sqrt(E), k, v, hidden).reshape(x.shape))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, attend: Attend, marked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.marked = nn.Embedding(V, D), nn.Linear(D, V), marked
        self.blocks = nn.ModuleList(Block(attend) for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.marked:
            x = tokenseek_fx.mark_tokens(x, dim=1)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def data(batch: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids, labels = torch.randint(V, (2, batch, tokens), generator=generator)
    labels[0, :2] = -100
    return {"ids": ids, "labels": labels}


@cache
def built(attend: Attend, marked: bool = False) -> Model:
    """A model that is captured once; the same parameters whatever its attention."""
    return Model(attend, marked).double()


def assert_exact(attend: Attend, plain: Attend | None, size: tuple[int, int], marked: bool = False, **options: Any):
    """Loss and gradients are those of the reference, of the same mathematics as ``plain`` if that is given."""
    run = executed(built(attend, marked), data(*size), report_loss="kept", **options)
    blocks = "blocks" if options.get("kv_grad") == "all" else None
    expected = by_reference(built(plain or attend), data(*size), run.indices, open_blocks=blocks)
    torch.testing.assert_close(run.loss.detach(), expected.loss.detach(), rtol=1e-12, atol=0)
    assert error(run.grads, expected.grads) < 1e-12
    return run


def received(attend: Attend, size: tuple[int, int], softmaxes: int) -> Tensor:
    """Attention received in the last block, from the softmaxes [B, H, queries, keys] of the eager model."""
    with Watch() as seen, torch.no_grad():
        built(attend)(**data(*size))
    return sum(seen.maps[-softmaxes:]).sum((1, 2))


# -- attention: [B, H, queries, keys] ---------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    return (q.transpose(1, 2) @ k.transpose(1, 2).transpose(2, 3)).masked_fill(hidden, -torch.inf)


def values(weights: Tensor, v: Tensor) -> Tensor:
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def softmax(block, q, k, v, hidden):
    return values(scores(q, k, hidden).softmax(-1), v)


def exp_over_sum(block, q, k, v, hidden):
    x = scores(q, k, hidden)
    return values(x.exp() / x.exp().sum(-1, keepdim=True), v)


def shifted_exp_over_sum(block, q, k, v, hidden):
    x = scores(q, k, hidden)
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return values(e / e.sum(dim=3).unsqueeze(3), v)


def exp_minus_logsumexp(block, q, k, v, hidden):
    x = scores(q, k, hidden)
    return values((x - x.logsumexp(-1, keepdim=True)).exp(), v)


def exp_of_log_softmax(block, q, k, v, hidden):
    return values(F.log_softmax(scores(q, k, hidden), -1).exp(), v)


def times_reciprocal_sum(block, q, k, v, hidden):
    e = scores(q, k, hidden).exp()
    return values(e * (1 / e.sum(-1, keepdim=True)), v)


def normalize(block, q, k, v, hidden):
    return values(F.normalize(scores(q, k, hidden).exp(), p=1.0, dim=-1), v)


def multiplied_and_summed(block, q, k, v, hidden):
    weights = scores(q, k, hidden).softmax(-1)
    return (weights.unsqueeze(-1) * v.transpose(1, 2).unsqueeze(2)).sum(3).transpose(1, 2)


def baddbmm(block, q, k, v, hidden):
    b, t = q.shape[:2]
    q, k, v = (x.transpose(1, 2).reshape(b * H, t, E) for x in (q, k, v))
    x = torch.baddbmm(torch.empty(b * H, t, t, dtype=q.dtype), q, k.mT, beta=0, alpha=1.0)
    return torch.bmm(x.masked_fill(hidden, -torch.inf).softmax(-1), v).view(b, H, t, E).transpose(1, 2)


def keys_first(block, q, k, v, hidden):
    x = (k.transpose(1, 2) @ q.transpose(1, 2).mT).masked_fill(hidden.T, -torch.inf)
    return (v.transpose(1, 2).mT @ x.softmax(-2)).mT.transpose(1, 2)


def keys_first_exp_over_sum(block, q, k, v, hidden):
    e = (k.transpose(1, 2) @ q.transpose(1, 2).mT).masked_fill(hidden.T, -torch.inf).exp()
    return values((e / e.sum(2, keepdim=True)).transpose(2, 3), v)


def turned_before_the_softmax(block, q, k, v, hidden):
    x = (k.transpose(1, 2) @ q.transpose(1, 2).mT).masked_fill(hidden.T, -torch.inf)
    return values(x.transpose(2, 3).softmax(-1), v)


def bqkh(block, q, k, v, hidden):
    x = torch.einsum("bqhe,bkhe->bqkh", q, k).masked_fill(hidden[None, :, :, None], -torch.inf)
    return torch.einsum("bqkh,bkhe->bqhe", x.softmax(2), v)


def bkqh(block, q, k, v, hidden):
    x = torch.einsum("bqhe,bkhe->bkqh", q, k).masked_fill(hidden.T[None, :, :, None], -torch.inf)
    return torch.einsum("bkqh,bkhe->bqhe", F.softmax(x, dim=1), v)


#: The same mathematics as ``softmax``, and whether its scores need not exist: attention by position reads it.
SAME = {
    softmax: True,
    exp_over_sum: True,
    shifted_exp_over_sum: True,
    exp_minus_logsumexp: True,
    exp_of_log_softmax: True,
    times_reciprocal_sum: False,
    normalize: False,
    multiplied_and_summed: False,
    baddbmm: False,
    keys_first: False,
    keys_first_exp_over_sum: False,
    turned_before_the_softmax: False,
    bqkh: False,
    bkqh: False,
}


@pytest.mark.parametrize("attend", SAME, ids=lambda f: f.__name__)
def test_the_same_attention_in_other_words_has_the_same_gradient(attend):
    first, second = SIZES
    assert_exact(attend, softmax, first, scorer="random")
    assert_exact(attend, softmax, first, scorer="attention", kv_grad="all")
    run = assert_exact(attend, softmax, second, scorer="tokenseek")
    torch.testing.assert_close(run.selection.attention, received(softmax, second, 1), rtol=1e-9, atol=0)
    by_position = captured(built(attend), data(*first)).program[PositionalAttentions]
    assert bool(by_position) is SAME[attend]


# -- other attention --------------------------------------------------------------------------------------------------


def masked_sum(block, q, k, v, hidden):
    e = (q.transpose(1, 2) @ k.transpose(1, 2).mT).exp() * ~hidden
    return values(e / (e.sum(-1, keepdim=True) + 1e-6), v)


def softmax_plus_one(block, q, k, v, hidden):
    e = scores(q, k, hidden).exp()
    return values(e / (1 + e.sum(-1, keepdim=True)), v)


def mixed_after(block, q, k, v, hidden):
    return values(torch.einsum("bhqk,hg->bgqk", scores(q, k, hidden).softmax(-1), block.mix), v)


def mixed_by_convolution(block, q, k, v, hidden):
    return values(F.conv2d(scores(q, k, hidden).softmax(-1), block.mix[:, :, None, None]), v)


def mixed_before(block, q, k, v, hidden):
    x = (q.transpose(1, 2) @ k.transpose(1, 2).mT).permute(0, 2, 3, 1) @ block.mix
    return values(x.permute(0, 3, 1, 2).masked_fill(hidden, -torch.inf).softmax(-1), v)


def mixed_twice(block, q, k, v, hidden):
    x = F.linear(torch.einsum("bqhe,bkhe->bqkh", q, k), block.mix)
    x = x.masked_fill(hidden[None, :, :, None], -torch.inf).softmax(2)
    return torch.einsum("bqkh,bkhe->bqhe", F.linear(x, block.mix), v)


def differential(block, q, k, v, hidden):
    first, second = scores(q, k, hidden).softmax(-1), scores(q.flip(-1), k, hidden).softmax(-1)
    return values(first - block.mix[0, 0].sigmoid() * second, v)


def differential_stacked(block, q, k, v, hidden):
    first, second = scores(q, k, hidden).softmax(-1).unflatten(1, (H // 2, 2)).unbind(2)
    return values(first - block.mix[0, 0] * second, v[:, :, ::2]).repeat(1, 1, 2, 1)


#: The number of softmaxes [B, H, queries, keys] in a block, by attention; None: not read in this form by the test.
OTHERS = {
    masked_sum: None,
    softmax_plus_one: None,
    mixed_after: 1,
    mixed_by_convolution: 1,
    mixed_before: 1,
    mixed_twice: None,
    differential: 2,
    differential_stacked: 1,
}


@pytest.mark.parametrize("attend", OTHERS, ids=lambda f: f.__name__)
def test_attention_with_other_sums_mixed_heads_and_differences_is_exact(attend):
    first, second = SIZES
    assert_exact(attend, None, first)
    assert_exact(attend, None, first, kv_grad="all")
    run = assert_exact(attend, None, second, scorer="tokenseek")
    if OTHERS[attend] is not None:
        expected = received(attend, second, OTHERS[attend])
        torch.testing.assert_close(run.selection.attention, expected, rtol=1e-9, atol=0)


def test_attention_received_of_a_masked_sum_is_that_of_its_weights():
    run = executed(built(masked_sum), data(*SIZES[0]), scorer="attention")
    torch.testing.assert_close(run.selection.attention, received(softmax, SIZES[0], 1), rtol=1e-5, atol=0)


# -- without softmax over the keys ------------------------------------------------------------------------------------


def sigmoid(block, q, k, v, hidden):
    return values((q.transpose(1, 2) @ k.transpose(1, 2).mT).sigmoid() * ~hidden, v)


def sigmoid_keys_first(block, q, k, v, hidden):
    x = (k.transpose(1, 2) @ q.transpose(1, 2).mT).sigmoid() * ~hidden.T
    return (v.transpose(1, 2).mT @ x).mT.transpose(1, 2)


def linear(block, q, k, v, hidden):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = torch.einsum("bqhe,bhef->bqhf", q, torch.einsum("bkhe,bkhf->bhef", k, v))
    return out / torch.einsum("bqhe,bhe->bqh", q, k.sum(1))[..., None]


def causal_linear(block, q, k, v, hidden):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
    return torch.einsum("bqhe,bqhef->bqhf", q, state) / (q * k.cumsum(1)).sum(-1, keepdim=True)


def efficient(block, q, k, v, hidden):
    return torch.einsum("bqhe,bhef->bqhf", q.softmax(-1), torch.einsum("bkhe,bkhf->bhef", k.softmax(1), v))


def efficient_turned(block, q, k, v, hidden):
    context = k.permute(0, 2, 3, 1).softmax(-1) @ v.transpose(1, 2)
    return (q.transpose(1, 2).softmax(-1) @ context).transpose(1, 2)


@pytest.mark.parametrize(
    ("attend", "plain"),
    [(sigmoid, None), (sigmoid_keys_first, sigmoid), (linear, None), (causal_linear, None), (efficient, None)],
    ids=lambda f: f and f.__name__,
)
def test_attention_without_softmax_over_keys_is_exact_if_its_tokens_are_marked(attend, plain):
    for size, scorer in zip(SIZES, ("random", "loss"), strict=True):
        assert_exact(attend, plain, size, marked=True, scorer=scorer)
    assert_exact(attend, plain, SIZES[0], marked=True, kv_grad="all")


@pytest.mark.parametrize("attend", [efficient, efficient_turned], ids=lambda f: f.__name__)
def test_a_softmax_of_keys_over_tokens_makes_no_token_axis_of_features(attend):
    """The softmax of the queries over features names the axis; without it, there is no attention."""
    assert_exact(attend, efficient, SIZES[0])


def test_a_mark_names_the_axis_that_attention_names():
    plain, marked = (executed(built(softmax, m), data(3, 7), scorer="attention", seed=0) for m in (False, True))
    assert torch.equal(plain.indices, marked.indices) and error(plain.grads, marked.grads) == 0


def test_marks_compile_and_explain():
    model, batch = built(sigmoid, True), data(3, 7)
    run: Run = compiled(model, batch, report_loss="kept")
    assert error(run.grads, by_reference(model, batch, run.indices).grads) < 1e-12
    assert "T = 7, marked in the model" in str(tokenseek_fx.explain(model, options={"keep_ratio": 0.5}, **batch))


def test_given_rows_of_a_marked_model():
    model, batch, indices = copy.deepcopy(built(linear, True)), data(3, 7), torch.tensor([[0, 2], [1, 6], [3, 4]])
    torch._dynamo.reset()
    step = torch.compile(model, backend="tokenseek", options={"inner": "eager"})
    with tokenseek_fx.selecting(indices):
        step(**batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert error(found, by_reference(built(linear), batch, indices).grads) < 1e-12


def test_a_mark_is_no_operation_in_eager():
    x = torch.randn(2, 3, 4)
    assert tokenseek_fx.mark_tokens(x, 1) is x and tokenseek_fx.mark_tokens(x, -2, batch_dim=None) is x
    for dims in ((3,), (0,), (1, 1), (2, -1)):
        with pytest.raises(ValueError, match="are not two dims of a tensor with 3 dims"):
            tokenseek_fx.mark_tokens(x, *dims)


def test_without_attention_the_reason_names_its_softmax_and_a_mark():
    class Gated(nn.Module):
        def forward(self, x, weight):
            return ((x @ weight).softmax(-1) * x).sum()

    torch._dynamo.reset()
    step = torch.compile(Gated(), backend="tokenseek", options={"inner": "eager"})
    with pytest.warns(TokenSeekWarning) as caught:
        step(torch.randn(2, 3, 4), torch.randn(4, 4, requires_grad=True))
    (message,) = [str(w.message) for w in caught if w.category is TokenSeekWarning]
    assert "no product with values contracts the dim of its softmax" in message
    assert "tokenseek_fx.mark_tokens(x, dim)" in message and "test_softmax_spellings.py" in message


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        ("gradient", "no attention, so its last block is not known"),
        ("attention", "No attention"),
    ],
)
def test_a_scorer_that_needs_attention_refuses_a_model_without(scorer, reason):
    with pytest.raises(GraphNotSupported, match=reason):
        executed(built(sigmoid, True), data(3, 7), scorer=scorer)
    assert_exact(sigmoid, None, (3, 7), marked=True, scorer="gradient", gradient_of="head")


# -- pooling by a learned query ---------------------------------------------------------------------------------------


class Pooling(Model):
    """A class for each sequence, from what ``pool(query, keys, values)`` makes of the tokens."""

    def __init__(self, pool: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(softmax)
        self.pool, self.keys, self.query = pool, nn.Linear(D, D), nn.Parameter(torch.randn(1, 1, D))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.pool(self.query, self.keys(x), x))[:, 0], labels[:, -1])


def pooled_by_operation(q, k, v):
    return F.scaled_dot_product_attention(q.expand(len(k), 1, D), k, v, scale=1.0)


def pooled_by_product(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def pooled_by_exp(q, k, v):
    e = (q @ k.mT).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def pooled_by_einsum(q, k, v):
    return torch.einsum("bqt,btd->bqd", torch.einsum("qd,btd->bqt", q[0], k).softmax(-1), v)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", [pooled_by_operation, pooled_by_product, pooled_by_exp, pooled_by_einsum])
def test_scores_of_a_single_query_have_no_rows(pool, size):
    """The query learns from all tokens, in every spelling, as it does in an attention operation."""
    run = executed(Pooling(pool).double(), data(*size), report_loss="kept")
    for spelling in (pool, pooled_by_operation):
        expected = by_reference(Pooling(spelling).double(), data(*size), run.indices, size[1])
        assert error(run.grads, expected.grads) < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_a_gate_is_a_value_with_rows(size):
    """What a weight computes from each row is a row, also where a softmax over the tokens follows."""
    pool = lambda q, k, v: ((k @ q[0].mT).softmax(1) * v).sum(1, keepdim=True)  # noqa: E731
    run = executed(Pooling(pool).double(), data(*size), report_loss="kept")
    expected = by_reference(Pooling(pool).double(), data(*size), run.indices, size[1])
    assert error(run.grads, expected.grads) < 1e-12
