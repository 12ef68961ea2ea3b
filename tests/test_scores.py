"""The scores, losses and gradients of every scorer, compared with the slow computation of ``scores.py``."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import architectures
import pytest
import scores
import torch
import torch.nn.functional as F
import transformers
import zoo
from compare import Run, assert_matches, compiled, error, executed, grads_of
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from test_random import RELAXED, Attention, Transformer, V, batches, configurations
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx import reference
from tokenseek_fx.passes.analysis.row_index import example_sizes
from tokenseek_fx.passes.analysis.token_axes import TokenAxes
from tokenseek_fx.passes.graph.errors import TokenSeekError
from tokenseek_fx.passes.graph.nodes import hint
from tokenseek_fx.passes.streams import scoring_tail as tail
from tokenseek_fx.warnings import TokenSeekWarning

B, T = 3, 13
built = cache(zoo.build)  # one model for all tests, so that its graph is captured once
NAMES = ("tokenseek", "attention", "gradient", "loss", "random", "strided", "first", "last")
TOY = {
    "depth": 2, "kv_heads": 2, "heads": 4, "head_dim": 4, "norm": "rms", "activation": "silu", "gated": True,
    "residual": "pre", "bias": False, "positions": "rotary", "attention": "sdpa", "seed": 0,
}  # fmt: skip
LAYERS = st.sampled_from(["last", "first", "all"])
COEFFICIENTS = st.sampled_from([(1.0, 1.0), (5.0, 5.0), (0.3, 2.0), (1.0, 0.0), (0.0, 1.0)])


# ---- toys


class Decoder(Transformer):
    """The random transformer under any mask [B or 1, 1, T, T] and any loss; logits where there are no labels."""

    def __init__(self, c: dict[str, Any] | None = None, loss: Any = None) -> None:
        super().__init__({**TOY, **(c or {})})
        self.loss = loss or (lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    def forward(self, ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x, rotary = self.embed(ids), self.rotary(ids.shape[1])
        for layer in self.layers:
            x = layer(x, mask, rotary)
        logits = self.head(x)
        return logits if labels is None else self.loss(logits, labels)


@cache
def decoder(**c: Any) -> Decoder:
    """One for all tests, so that its graph is captured once."""
    return Decoder(c)


def near(queries: Tensor) -> Tensor:
    """bool [T, T]: a query sees itself and the 3 keys before it."""
    seen = torch.ones(queries.shape[-2], queries.shape[-2], dtype=torch.bool).tril()
    return seen & ~seen.tril(-4)


class Window(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, near(q))


class Additive(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = torch.zeros(near(q).shape, dtype=q.dtype).masked_fill(~near(q), torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=0.4)


class SoftCapped(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        capped = 2 * torch.tanh(q @ k.mT / self.dim**0.5 / 2)
        return capped.masked_fill(~near(q), -torch.inf).softmax(-1) @ v


class SoftCappedHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * 3 * torch.tanh(super().forward(x) / 3)


@cache
def with_attention(kind: type[Attention]) -> Decoder:
    model = Decoder()
    for layer in model.layers:
        layer.attention = kind(model.c, 16)
    return model.double()


@cache
def with_soft_capped_head() -> Decoder:
    model = Decoder()
    model.head = SoftCappedHead(16, V, bias=False)
    return model.double()


@cache
def with_loss(
    reduction: str, label_smoothing: float = 0.0, ignore_index: int = -100, weighted: bool = False
) -> Decoder:
    how = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    weight = CLASS_WEIGHT if weighted else None
    return Decoder(loss=lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, **how))


def tokens(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(V, (2, B, T), generator=generator)
    return {"ids": ids, "labels": labels.masked_fill(torch.rand(B, T, generator=generator) < 0.3, -100)}


def padded(side: str) -> dict[str, Tensor]:
    """Padding of 0, 2 and 4 positions under a causal mask; on the left, padded queries are fully masked."""
    count = torch.tensor([0, 2, 4])[:, None]
    position = torch.arange(T).expand(B, T)
    real = position >= count if side == "left" else position < T - count
    batch = tokens()
    mask = real[:, None, None] & torch.ones(T, T, dtype=torch.bool).tril()
    return {**batch, "labels": batch["labels"].masked_fill(~real, -100), "mask": mask}


def packed() -> dict[str, Tensor]:
    """Three documents in every instance, none of which sees another."""
    document = torch.bucketize(torch.arange(T), torch.tensor([3, 8]))
    mask = (document[:, None] == document) & torch.ones(T, T, dtype=torch.bool).tril()
    return {**tokens(), "mask": mask.expand(B, 1, T, T)}


# ---- comparing


def close(found: Tensor, expected: Tensor, tol: float) -> None:
    scale = expected[expected.isfinite()].abs().max().item()
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=tol, atol=tol * max(scale, 1e-300))


def assert_scores(
    model: nn.Module,
    batch: dict[str, Any],
    tol: float = 1e-9,
    blocks: str = "layers",
    head: str = "head",
    alpha: float = 1.0,
    beta: float = 1.0,
    **options: Any,
) -> Run:
    """Scores, selection, full loss and gradients are those of the slow computation."""
    where = {name: options[name] for name in ("attention_layers", "gradient_of") if name in options}
    expected = scores.signals(model, batch, list(model.get_submodule(blocks)), model.get_submodule(head), **where)
    options = {"alpha": alpha, "beta": beta, "report_loss": "full", "select": "topk", **options}
    for name, read in {"attention_layers": alpha, "gradient_of": beta}.items():
        if not read:  # an option that nothing reads is an error
            options.pop(name, None)
    run = assert_matches(model, batch, tol, scorer="tokenseek", **options)
    seen = run.selection
    if run.indices.shape == seen.scores.shape:  # all are kept: nothing is scored
        return run
    assert (seen.attention is None) == (alpha == 0) and (seen.gradient is None) == (beta == 0)
    if alpha:
        close(seen.attention, expected.attention, tol)
    if beta:
        close(seen.gradient, expected.gradient, tol)
    if seen.loss is not None:
        close(seen.loss, expected.loss, tol)
    assert torch.equal(seen.labelled, expected.labelled)
    close(seen.scores, scores.tokenseek(expected, alpha, beta), tol)
    close(run.loss.detach(), expected.total, tol)
    for score, labels, indices in zip(seen.scores.tolist(), seen.labelled.tolist(), run.indices.tolist(), strict=True):
        attended = [s > -torch.inf for s in score]
        noise = [float(i in indices) for i in range(len(score))]  # of equal scores, those that were kept
        assert indices == scores.Rules(len(indices), labels, attended, noise=noise).choose(score)
    return run


# ---- scores


@settings(max_examples=7, **RELAXED)
@given(
    configurations(), batches(), st.floats(0.05, 0.95), COEFFICIENTS, LAYERS, st.sampled_from(["last_block", "head"])
)
def test_scores_of_random_transformers(configuration, batch, ratio, coefficients, layers, gradient_of):
    alpha, beta = coefficients
    how = {"attention_layers": layers, "gradient_of": gradient_of, "keep_ratio": ratio}
    assert_scores(Transformer(configuration), batch, alpha=alpha, beta=beta, **how)


@pytest.mark.slow
@settings(max_examples=25, **{**RELAXED, "derandomize": False})
@given(
    configurations(), batches(), st.floats(0.05, 0.95), COEFFICIENTS, LAYERS, st.sampled_from(["last_block", "head"])
)
def test_scores_of_more_random_transformers(configuration, batch, ratio, coefficients, layers, gradient_of):
    alpha, beta = coefficients
    how = {"attention_layers": layers, "gradient_of": gradient_of, "keep_ratio": ratio}
    assert_scores(Transformer(configuration), batch, alpha=alpha, beta=beta, **how)


@pytest.mark.parametrize("layers", ["last", slow("first"), slow("all"), [0, 2], slow([-1])])
def test_attention_layers(layers):
    assert_scores(decoder(depth=3), tokens(), attention_layers=layers)


@pytest.mark.parametrize("attention", ["sdpa", "gqa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_ranks_last(attention, side):
    if attention == "eager" and side == "left":
        pytest.skip("the toy's -1e9 gives queries without keys uniform attention")
    run = assert_scores(decoder(attention=attention), padded(side), keep_ratio=0.7)
    assert run.selection.scores.isneginf().sum(1).tolist() == [0, 2, 4]


@pytest.mark.parametrize("attention", ["sdpa", "gqa", "eager"])
def test_packed_documents(attention):
    assert_scores(decoder(attention=attention), packed())


@pytest.mark.parametrize("gradient_of", ["last_block", "head"])
@pytest.mark.parametrize("kind", [Window, Additive, SoftCapped])
def test_windows_additive_masks_scales_and_soft_caps(kind, gradient_of):
    assert_scores(with_attention(kind), tokens(), gradient_of=gradient_of, attention_layers="all")


@pytest.mark.parametrize("gradient_of", ["last_block", "head"])
@pytest.mark.parametrize("logits", ["keep", "drop"])
def test_soft_capped_and_scaled_logits(gradient_of, logits):
    assert_scores(with_soft_capped_head(), tokens(), gradient_of=gradient_of, logits=logits)


CLASS_WEIGHT = torch.linspace(0.5, 2, V, dtype=torch.float64)
LOSSES = {
    "sum": {"reduction": "sum"},
    "another ignored label": {"reduction": "mean", "ignore_index": 3},
    "label smoothing": {"reduction": "mean", "label_smoothing": 0.1},
    "class weights": {"reduction": "mean", "weighted": True},
    "all of them": {"reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1, "weighted": True},
}


@pytest.mark.parametrize("gradient_of", ["last_block", "head"])
@pytest.mark.parametrize("case", LOSSES)
def test_losses(case, gradient_of):
    how, batch = LOSSES[case], tokens()
    if "ignore_index" in how:
        batch["labels"] = batch["labels"].where(batch["labels"] >= 0, 3)
    assert_scores(with_loss(**how), batch, gradient_of=gradient_of)


def test_a_head_with_bias_and_logits_cut_by_the_model():
    """The last logits are cut off, as older models shift: the last token has no label."""
    cut = lambda logits, labels: F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # noqa: E731
    model = Decoder(loss=cut)
    model.head = nn.Linear(16, V).double()
    assert_scores(model, tokens())


@pytest.mark.parametrize("count", [2, slow(3), 5, slow(7), slow(8), slow(12), 13])
def test_any_number_of_chunks(count, monkeypatch):
    monkeypatch.setattr(tail.Tail, "chunks", lambda self, budget: tail.cut(T, count))
    assert_scores(decoder(), tokens())


def test_chunks_are_positive_and_add_up():
    for length in range(1, 80):
        for count in range(1, min(length, 64) + 1):
            sizes = tail.cut(length, count)
            assert sum(sizes) == length and min(sizes) > 0 and len(sizes) <= count


@pytest.mark.slow
def test_lengths_that_change_under_chunks(monkeypatch):
    def four(self: tail.Tail, budget: int) -> list[Any]:
        _, length = example_sizes(self.program, self.program[TokenAxes].main)
        return tail.cut(length, min(4, hint(length)))

    monkeypatch.setattr(tail.Tail, "chunks", four)
    torch._dynamo.reset()
    model = Decoder()
    options = {"scorer": "tokenseek", "select": "topk", "inner": "eager", "strict": True}
    step = torch.compile(model, backend="tokenseek", dynamic=True, options=options)
    for length in (13, 10, 3):
        batch = {name: value[:, :length] for name, value in tokens().items()}
        with tokenseek_fx.record() as rec:
            loss = step(**batch)
        expected = scores.signals(model, batch, list(model.layers), model.head)
        close(rec[0].gradient, expected.gradient, 1e-9)
        close(loss.detach(), expected.total, 1e-9)


def test_scores_do_not_depend_on_what_is_trained():
    every = executed(decoder(), tokens(), scorer="tokenseek").selection
    for names in (("layers.1.",), ("layers.1.attention.q",), ("head",)):
        model = Decoder()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(names))
        some = executed(model, tokens(), scorer="tokenseek").selection
        close(some.gradient, every.gradient, 1e-12)


class Parts(Decoder):
    """Returns a penalty before its loss."""

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.weight.square().mean(), super().forward(ids, labels)


def test_of_several_scalars_the_loss_is_scored():
    parts, plain = (executed(m, tokens(), scorer="tokenseek").selection for m in (Parts(), decoder()))
    close(parts.gradient, plain.gradient, 1e-12)


class TwoHeads(Decoder):
    """Two labels for every token, as in multi-token prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, V).double()

    def forward(self, ids: Tensor, labels: Tensor, others: Tensor) -> Tensor:
        x, rotary = self.embed(ids), self.rotary(ids.shape[1])
        for layer in self.layers:
            x = layer(x, None, rotary)
        return self.loss(self.head(x), labels) + 0.3 * self.loss(self.second(x), others)


@pytest.mark.parametrize("masked", [False, True])
def test_two_losses_over_tokens(masked):
    others = torch.full((B, T), -100) if masked else tokens(1)["labels"]
    model = TwoHeads()
    run = executed(model, {**tokens(), "others": others}, scorer="tokenseek", report_loss="full")
    assert run.loss.isfinite() and all(g.isfinite().all() for g in run.grads.values())
    if masked:
        close(run.loss.detach(), Decoder.forward(model, **tokens()).detach(), 1e-9)


# ---- transformers


@cache
def bloom() -> nn.Module:
    sizes = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    config = transformers.BloomConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, use_cache=False)
    torch.manual_seed(0)
    return transformers.BloomForCausalLM(config).double().train()


@pytest.mark.parametrize("gradient_of", ["last_block", "head"])
def test_a_custom_function_in_the_last_block(gradient_of):
    """BLOOM's GELU has a backward of its own."""
    model = bloom()
    batch = zoo.batch(model, B, T)
    assert_scores(model, batch, 1e-5, "transformer.h", "lm_head", gradient_of=gradient_of)


@cache
def granite() -> nn.Module:
    config = transformers.GraniteConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, pad_token_id=None,
        logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return zoo.with_large_weights(transformers.GraniteForCausalLM(config)).double().train()


@pytest.mark.slow
@pytest.mark.parametrize("gradient_of", ["last_block", "head"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_scores_of_transformers(name, padding, gradient_of):
    """float32 inside the losses, gemma2's softmax and norms: 1e-5."""
    if (name, padding) == ("gemma2", "left"):
        pytest.skip("NaN in transformers' own eager attention at float64")
    model = granite() if name == "granite" else built(name)
    batch = zoo.batch(model, B, T, padding)
    assert_scores(model, batch, 1e-5, "model.layers", "lm_head", gradient_of=gradient_of, logits="drop")


@pytest.mark.parametrize("chunk_bytes", [None, 3000])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_scores_of_experts(name, chunk_bytes):
    """The last block sorts rows by expert. float32 (transformers' own experts are not in float64): 1e-4."""
    model, batch = architectures.build(name, "eager", 23, torch.float32)
    assert_scores(model, batch, 1e-4, "model.layers", "lm_head", length=23, chunk_bytes=chunk_bytes)


# ---- gradients and reported losses


@pytest.mark.parametrize("logits", ["keep", "drop"])
@pytest.mark.parametrize("report", ["full", "kept"])
@pytest.mark.parametrize("scorer", ["tokenseek", "random"])
def test_reported_loss(scorer, report, logits):
    assert_matches(decoder(), tokens(), 1e-9, scorer=scorer, report_loss=report, logits=logits)


@pytest.mark.parametrize(("scorer", "report"), [("tokenseek", "full"), ("loss", "full"), ("random", "kept")])
def test_the_full_loss_is_reported_where_it_is_known_anyway(scorer, report):
    by_default, named = (
        executed(decoder(), tokens(), seed=1, scorer=scorer, **o) for o in ({}, {"report_loss": report})
    )
    assert by_default.loss == named.loss
    assert error(by_default.grads, named.grads) < 1e-12


@settings(max_examples=6, **RELAXED)
@given(
    configurations(),
    batches(),
    st.floats(0.05, 0.95),
    st.sampled_from(NAMES),
    st.sampled_from(["topk", "sample"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(["selected", "all"]),
)
def test_gradients_of_random_transformers(configuration, batch, ratio, scorer, select, share, kv_grad):
    how = {"scorer": scorer, "select": select, "labelled_first": share, "kv_grad": kv_grad, "report_loss": "full"}
    blocks = "layers" if kv_grad == "all" else None
    assert_matches(Transformer(configuration), batch, 1e-9, open_blocks=blocks, keep_ratio=ratio, **how)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scorer", ["tokenseek", "strided"])
def test_sampled_rows_are_weighted(scorer, reduction):
    model = with_loss(reduction, label_smoothing=0.1, weighted=True)
    run = assert_matches(model, tokens(), 1e-9, scorer=scorer, select="sample", weight_clip=4.0, report_loss="kept")
    assert run.selection.weights.shape == run.indices.shape
    assert 1 < run.selection.weights.max() <= 4


def test_a_regression_over_tokens_is_weighted():
    model = Decoder(loss=lambda logits, labels: F.mse_loss(logits, F.one_hot(labels.clamp(min=0), V).double()))
    assert_matches(model, tokens(), 1e-9, scorer="attention", select="sample", report_loss="kept")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("padding", [slow(None), "right"])
def test_live_keys_and_values_of_transformers(name, padding):
    model = built(name)
    how = {"open_blocks": "model.layers", "kv_grad": "all", "report_loss": "kept", "logits": "drop"}
    assert_matches(model, zoo.batch(model, B, T, padding), 1e-6, scorer="tokenseek", **how)


def test_live_keys_and_values_change_the_gradient():
    """The comparison can fail: keys and values of all tokens give their projections another gradient."""
    some, every = (executed(decoder(), tokens(), scorer="strided", kv_grad=kv).grads for kv in ("selected", "all"))
    assert {name.split(".")[-2] for name in some if (some[name] - every[name]).abs().max() > 1e-9} == {
        "k",
        "v",
        "norm1",
    }


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("scorer", ["tokenseek", "random"])
def test_accumulated_micro_batches_under_a_given_count(scorer, select):
    """transformers divides the sum over labelled tokens by the count of both micro-batches."""
    torch._dynamo.reset()
    model = zoo.build("llama")
    halves = [zoo.batch(model, B, T, "right", seed=seed) for seed in (0, 1)]
    count = sum((half["labels"][:, 1:] != -100).sum() for half in halves)
    halves = [{**half, "num_items_in_batch": count} for half in halves]
    expected, plain = copy.deepcopy(model), copy.deepcopy(model)
    how = {"keep_ratio": 0.3, "scorer": scorer, "select": select, "strict": True, "inner": "eager"}
    step = torch.compile(model, backend="tokenseek", options={**how, "report_loss": "full"})
    with tokenseek_fx.record() as rec:
        losses = [step(**half).loss for half in halves]
        sum(losses).backward()
    torch.testing.assert_close(sum(losses), sum(plain(**half).loss for half in halves), rtol=1e-6, atol=0)
    for half, selection in zip(halves, rec, strict=True):
        with reference.ditching(expected, selection.indices, weights=selection.weights):
            expected(**half).loss.backward()
    assert error(grads_of(model), grads_of(expected)) < 1e-6


# ---- labels that are missing


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("scorer", NAMES)
def test_an_instance_without_labels(scorer, select):
    batch = tokens()
    batch["labels"][1] = -100
    run = assert_matches(decoder(), batch, 1e-9, scorer=scorer, select=select, report_loss="full")
    assert_recorded(run)


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("scorer", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_labels_at_all(scorer, select, reduction):
    batch = {**tokens(), "labels": torch.full((B, T), -100)}
    run = executed(with_loss(reduction), batch, scorer=scorer, select=select, report_loss="kept")
    assert_recorded(run)
    assert run.loss == 0 and not any(g.any() for g in run.grads.values())


@pytest.mark.parametrize("scorer", NAMES)
def test_one_labelled_token_is_kept(scorer):
    batch = tokens()
    batch["labels"][:, :7], batch["labels"][:, 8:] = -100, -100
    batch["labels"][:, 7] = 5
    how = {"scorer": scorer, "keep_tokens": 2, "keep_ratio": None, "select": "topk"}
    run = assert_matches(decoder(), batch, 1e-9, **how, report_loss="full", keep_label=True)
    assert (run.indices == 7).any(1).all()


def test_without_keep_label_the_scores_alone_decide():
    batch = tokens()
    batch["labels"][:, :7] = -100
    run = executed(decoder(), batch, scorer="first", keep_label=False, select="topk", report_loss="kept")
    assert run.indices.tolist() == [[0, 1, 2, 3]] * B
    assert run.loss == 0 and not any(g.any() for g in run.grads.values())


# ---- every scorer on padded and packed batches


def favourite(inputs: Any) -> Tensor:
    """A user-defined scorer: the middle."""
    position = torch.arange(inputs.tokens, device=inputs.device)
    return -(position - inputs.tokens // 2).abs().double().expand(inputs.batch, inputs.tokens)


def assert_recorded(run: Run) -> None:
    """Everything that is recorded is finite (scores: below infinity) and of the right shape."""
    seen, k = run.selection, run.indices.shape[1]
    assert seen.scores.shape == (B, T) and not seen.scores.isnan().any() and not seen.scores.isposinf().any()
    assert (run.indices.diff(dim=1) > 0).all() and run.indices.shape == (B, k)
    for name in ("attention", "gradient", "loss"):
        value = getattr(seen, name)
        assert value is None or (value.shape == (B, T) and value.isfinite().all() and (value >= 0).all())
    assert seen.weights is None or (seen.weights.shape == (B, k) and seen.weights.isfinite().all())
    assert all(g.isfinite().all() for g in run.grads.values())


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("batch", ["left", "right", "packed"])
@pytest.mark.parametrize("scorer", [*NAMES, favourite])
def test_every_scorer_on_padded_and_packed_batches(scorer, batch, select):
    inputs = packed() if batch == "packed" else padded(batch)
    run = assert_matches(decoder(), inputs, 1e-9, scorer=scorer, select=select, report_loss="full")
    assert_recorded(run)
    if batch != "packed":
        real = inputs["mask"].any(2)[:, 0]
        assert real.gather(1, run.indices).all(), "padding was kept"


PACKED = (torch.arange(T)[:, None] < 6) == (torch.arange(T) < 6)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["left", "right", "packed"])
@pytest.mark.parametrize("scorer", NAMES)
def test_every_scorer_on_padded_and_packed_batches_of_a_llama(scorer, batch):
    model = built("llama")
    inputs = zoo.batch(model, B, T, None if batch == "packed" else batch)
    if batch == "packed":
        inputs["attention_mask"] = (PACKED & torch.ones(T, T).tril().bool()).expand(B, 1, T, T)
        inputs["position_ids"] = torch.arange(T).remainder(6).expand(B, T)
    run = assert_matches(model, inputs, 1e-6, scorer=scorer, report_loss="full")
    assert_recorded(run)
    if batch != "packed":
        assert inputs["attention_mask"].gather(1, run.indices).all(), "padding was kept"


def test_the_same_seed_draws_the_same_rows():
    draws = [executed(decoder(), tokens(), scorer="tokenseek", select="sample", seed=s).indices for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("scorer", ["tokenseek", "random"])
@pytest.mark.parametrize("logits", ["keep", "drop"])
def test_a_full_loss_of_no_labels_is_0(scorer, logits):
    batch = {**tokens(), "labels": torch.full((B, T), -100)}
    run = executed(decoder(), batch, scorer=scorer, logits=logits, report_loss="full")
    assert run.loss == 0 and not any(g.any() for g in run.grads.values())


# ---- no loss in the graph


@pytest.mark.parametrize("scorer", ["tokenseek", "gradient"])
def test_without_a_loss_the_attention_part_scores(scorer):
    torch._dynamo.reset()
    model, ids = Decoder(), tokens()["ids"]
    options = {"scorer": scorer, "inner": "eager", "keep_ratio": 0.3, "select": "topk"}
    with warnings.catch_warnings(record=True) as caught, tokenseek_fx.record() as rec:
        warnings.simplefilter("always")
        logits = torch.compile(model, backend="tokenseek", options=options)(ids)
        logits.square().sum().backward()
    assert len([w for w in caught if issubclass(w.category, TokenSeekWarning)]) == 1
    wanted = executed(decoder(), tokens(), scorer="tokenseek", beta=0.0, select="topk", keep_label=False)
    assert torch.equal(rec[0].indices, wanted.indices)
    close(rec[0].attention, wanted.selection.attention, 1e-9)
    assert rec[0].gradient is None and rec[0].loss is None
    expected = Decoder()
    with reference.ditching(expected, rec[0].indices):
        expected(ids).square().sum().backward()
    assert error(grads_of(model), grads_of(expected)) < 1e-9


@pytest.mark.parametrize("scorer", ["tokenseek", "gradient"])
def test_without_a_loss_strict_raises(scorer):
    torch._dynamo.reset()
    step = torch.compile(Decoder(), backend="tokenseek", options={"scorer": scorer, "strict": True, "inner": "eager"})
    with pytest.raises(Exception, match="loss") as caught:
        step(tokens()["ids"])
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), TokenSeekError)


@pytest.mark.parametrize("scorer", ["attention", "random", "strided"])
def test_scorers_that_need_no_loss_say_nothing_without_one(scorer):
    torch._dynamo.reset()
    step = torch.compile(Decoder(), backend="tokenseek", options={"scorer": scorer, "strict": True, "inner": "eager"})
    with warnings.catch_warnings(), tokenseek_fx.record() as rec:
        warnings.simplefilter("error", TokenSeekWarning)
        step(tokens()["ids"]).square().sum().backward()
    assert rec[0].indices.shape == (B, 2)


class ByHand(Decoder):
    """A loss without a loss operation."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        chosen = super().forward(ids).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return -(chosen * (labels >= 0)).sum() / (labels >= 0).sum()


def test_drawn_rows_without_a_loss_to_weigh_are_refused():
    with pytest.raises(Exception, match="drawn tokens have no place for a weight") as caught:
        compiled(ByHand(), tokens(), scorer="attention", select="sample", inner="eager")
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), TokenSeekError)


def test_a_loss_by_hand_under_the_default():
    """Its tokens have a gradient but no loss; rows are not drawn, since nothing would weigh them."""
    torch._dynamo.reset()
    with pytest.warns(TokenSeekWarning, match="scored by gradient"), tokenseek_fx.record() as rec:
        torch.compile(ByHand(), backend="tokenseek", options={"inner": "eager"})(**tokens()).backward()
    assert rec[0].weights is None and rec[0].gradient is not None


def test_a_model_split_on_the_way_to_its_loss_is_refused():
    """transformers collects hidden states by hooks, at which Dynamo splits the model inside."""
    model, batch = zoo.build("llama"), {**zoo.batch(zoo.build("llama"), B, T), "output_hidden_states": True}
    with pytest.raises(Exception, match="runs the forward of LlamaModel as plain Python"):
        compiled(model, batch, inner="eager")
    torch._dynamo.reset()
    with pytest.warns(TokenSeekWarning, match="as plain Python"):
        torch.compile(model, backend="tokenseek", options={"inner": "eager"})(**batch).loss.backward()
    expected = zoo.build("llama")
    expected(**batch).loss.backward()
    assert error(grads_of(model), grads_of(expected)) < 1e-9, "plain training"


class Pooled(Decoder):
    """One learned query attends to all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.probe, self.kv = nn.Parameter(torch.randn(1, 1, 1, 16).double()), nn.Linear(16, 32).double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x, rotary = self.embed(ids), self.rotary(ids.shape[1])
        for layer in self.layers:
            x = layer(x, None, rotary)
        k, v = self.kv(x)[:, None].chunk(2, -1)
        pooled = F.scaled_dot_product_attention(self.probe.expand(len(x), 1, 1, 16), k, v)
        return F.cross_entropy(self.head(pooled[:, 0, 0]), labels[:, 0].clamp(min=0))


@cache
def pooled() -> Pooled:
    return Pooled()


@pytest.mark.parametrize("scorer", ["strided", "attention", "tokenseek"])
def test_pooling_by_attention(scorer):
    assert_matches(pooled(), tokens(), 1e-9, scorer=scorer)


# ---- pinned positions


@pytest.mark.parametrize("select", ["topk", "sample"])
def test_pinned_positions_are_kept(select):
    run = assert_matches(
        decoder(), tokens(), 1e-9, scorer="tokenseek", select=select, pinned=(0, -2), report_loss="kept"
    )
    assert (run.indices == 0).any(1).all() and (run.indices == T - 2).any(1).all()
    if select == "sample":
        assert (run.selection.weights[(run.indices == 0) | (run.indices == T - 2)] == 1).all()


CLASSIFIER = {"vocab_size": 97, "num_labels": 5, "pad_token_id": 0}
POSITION = torch.arange(T)


def classifier(name: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CLASSIFIER, **sizes)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).double().train()


@cache
def bert() -> nn.Module:
    return classifier(
        "Bert", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


@cache
def gpt2() -> nn.Module:
    return classifier(
        "GPT2", n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def classified() -> tuple[dict[str, Tensor], Tensor]:
    """A right-padded batch with one label per instance, and the last real position of each."""
    last = torch.tensor([T - 1, 9, 6])
    real = last[:, None] >= POSITION
    ids = torch.randint(1, 97, (B, T), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": torch.tensor([1, 4, 2])}, last


@pytest.mark.parametrize("scorer", ["last", "attention", "tokenseek"])
def test_the_position_that_a_classifier_reads_first_is_pinned(scorer):
    run = assert_matches(bert(), classified()[0], 1e-6, scorer=scorer)
    assert (run.indices[:, 0] == 0).all()


def test_a_classifier_has_no_token_losses():
    """Its loss is that of whole sequences: the highest gradients are kept instead, and one warning says so.

    Drawn rows would have no loss to be weighted in.
    """
    with pytest.warns(TokenSeekWarning, match="no loss of its own. Tokens are scored by gradient instead") as caught:
        run = assert_matches(bert(), classified()[0], 1e-6, scorer="loss", select=None)
    assert len([w for w in caught if issubclass(w.category, TokenSeekWarning)]) == 1
    assert run.selection.weights is None and run.selection.loss is None
    highest = run.selection.gradient.index_fill(1, torch.tensor(0), torch.inf).topk(4).indices  # position 0 is pinned
    assert torch.equal(run.indices, highest.sort(-1).values)


@pytest.mark.parametrize("scorer", ["first", "attention", "tokenseek"])
def test_the_last_real_position_that_a_classifier_reads_is_pinned(scorer):
    batch, last = classified()
    run = assert_matches(gpt2(), batch, 1e-6, scorer=scorer)
    assert (run.indices == last[:, None]).any(1).all()


class Sinks(nn.Module):
    """Eager attention with a learned column beside the keys, which takes some of every query's attention weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 20)
        self.sink = nn.Parameter(torch.tensor(0.5))

    def shares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2)
        column = self.sink.expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1], value

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        shares, value = self.shares(x)
        x = x + (shares @ value).transpose(1, 2).flatten(2)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_attention_received_beside_a_sink():
    torch.manual_seed(0)
    model, ids = Sinks().double(), torch.randint(20, (3, 11))
    run = assert_matches(model, {"ids": ids, "labels": ids}, 1e-9, length=11, scorer="attention")
    received = model.shares(model.embed(ids))[0].sum((1, 2)).detach()
    torch.testing.assert_close(run.selection.attention, received, rtol=1e-9, atol=1e-12)
