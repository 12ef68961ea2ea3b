"""What is saved for backward: recomputed values are the same, and random ones are not recomputed."""

from __future__ import annotations

import contextlib
import functools
import warnings

import architectures
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from compare import assert_matches, error, grads_of, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import slow
from programs import rewritten
from test_backend import Model, compile_eager, data
from test_pipeline import captured
from test_random import RATIOS, Transformer, batches, configurations
from test_split import Autocast
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import tokenseek_fx
from tokenseek_fx import ConfigError, TokenSeekWarning
from tokenseek_fx.passes.keep.kv_modes import KV_MODES
from tokenseek_fx.passes.lower.split import Segments
from tokenseek_fx.passes.memory.kv_storage import store_kv

RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
B, T, D, V = 2, 13, 12, 29


def draw(x: Tensor) -> Tensor:
    """A hidden layer times the results of several random operations."""
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


class PositionalAttention(nn.Module):
    """One attention without dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Embedding(V, D), nn.Linear(D, 3 * D), nn.Linear(D, V)
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens(length: int = T) -> dict[str, Tensor]:
    ids = torch.randint(V, (B, length), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "labels": ids}


@settings(max_examples=6, **RELAXED)
@given(configurations(), batches(), RATIOS)
def test_recomputed_rows_equal_the_reference(configuration, batch, ratio):
    assert_matches(Transformer(configuration), batch, 1e-9, keep_ratio=ratio, recompute="rows")


def halfway(model: nn.Module, batch: dict[str, Tensor], **options) -> int:
    """A number of bytes between those saved if no block and if every block is recomputed."""
    found = saved(model, batch, **{**options, "inner": "aot_eager"})
    most, least = (found.if_recomputed(count).bytes for count in (0, len(found.segments.segments)))
    assert most > least + 2
    return (most + least) // 2


@pytest.mark.parametrize("scorer", [slow("random"), "tokenseek"])
def test_some_recomputed_blocks_equal_the_reference(scorer):
    options = {"keep_ratio": 0.4, "scorer": scorer, "select": "topk", "logits": "drop"}
    model, ids = llama(2).double(), torch.randint(WORDS, (B, 40))
    batch = {"input_ids": ids, "labels": ids}
    assert_matches(model, batch, 1e-9, **options, recompute=halfway(model, batch, **options))


@pytest.mark.parametrize(
    ("recompute", "inner"),
    [("none", "aot_eager"), ("rows", "aot_eager"), ("halfway", "aot_eager"), slow("halfway", "inductor")],
)
def test_backward_uses_the_draws_of_the_forward(inner, recompute):
    """The slope of the loss along the last block's layers, which leave keys and values unchanged, with one seed."""
    model, batch = Drawing(), tokens()
    options = {"inner": inner, "keep_ratio": 0.4, "scorer": "first", "report_loss": "kept"}
    options["recompute"] = halfway(model, batch, **options) if recompute == "halfway" else recompute
    torch._dynamo.reset()
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


# -- bytes ------------------------------------------------------------------------------------------------------------

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


@functools.cache
def explained_with(name: str, recompute: str) -> tokenseek_fx.Explanation:
    """The explanation of one of ``MODELS``, which several tests compare with."""
    return explained(MODELS[name](), recompute=recompute)


@pytest.mark.parametrize("recompute", ["none", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_near_the_lower_bound(name, recompute):
    report = explained_with(name, recompute)
    heads = 2 if name == "grouped heads" else 4
    assert report.rewritten.by_kind()["keys/values"] == 3 * 2 * B * LENGTH * heads * 32 * 4
    assert report.rewritten.bytes <= 1.15 * report.lower_bound
    assert not report.rewritten.unexplained
    if recompute == "rows":
        assert report.lower_bound == report.rewritten.by_kind()["keys/values"] + (3 + 1) * B * report.kept * WIDTH * 4


def test_no_block_holds_terms_of_the_scores_of_all_tokens_that_only_keys_give():
    """DeBERTa's position-to-content scores: live in the rows of keys, read in those of queries."""
    model, batch = architectures.build("deberta_v2 tag", "eager", LENGTH, torch.float32)
    report = tokenseek_fx.explain(model, **batch, options={"recompute": "rows"})
    square = [
        [edge for edge in audit.edges if edge.shape.count(LENGTH) > 1] for audit in (report.plain, report.rewritten)
    ]
    assert square[0] and not square[1]


@pytest.mark.parametrize("blocks", [slow(0), 1, slow(3)])
def test_by_default_as_many_last_blocks_are_kept_as_fit_into_the_forward_of_all_tokens(blocks):
    none, rows = (explained_with("grouped heads", way) for way in ("none", "rows"))
    # per row: query, attention and its log-sum-exps, three projections of the width, gate and up; key and value
    products = B * none.kept * (5 * WIDTH + 4 + 2 * INNER + 2 * 64) * 4
    gradient = INNER * WIDTH * 4  # the largest after the last attention
    chunk_bytes = int(((blocks + 0.5) * products + gradient) / 4)
    assert 3 * chunk_bytes > (blocks + 0.5) * products, "so that the gradient is what leaves no more room"
    assert chunk_bytes < B * LENGTH * INNER * 4, "there are chunks"
    report = explained(llama(2), chunk_bytes=chunk_bytes)
    saved = [each.rewritten.by_kind()["rows"] for each in (rows, report, none)]
    assert saved[0] + blocks * (saved[2] - saved[0]) / 3 == pytest.approx(saved[1], rel=0.02)
    assert none.forwards <= report.forwards <= rows.forwards and report.rewritten.bytes <= 1.15 * report.lower_bound


@pytest.mark.parametrize("blocks", [slow(0), 1, slow(3)])
def test_a_number_of_bytes_recomputes_as_few_blocks_as_possible(blocks):
    none, rows = (explained_with("grouped heads", way).rewritten.bytes for way in ("none", "rows"))
    budget = int(none - (blocks - 0.5) * (none - rows) / 3) if blocks else none
    saved = explained(llama(2), recompute=budget).rewritten.bytes
    assert saved <= budget and saved == pytest.approx(none - blocks * (none - rows) / 3, rel=0.02)


def test_without_chunks_every_block_is_recomputed_by_default():
    assert explained(llama(2)).rewritten == explained_with("grouped heads", "rows").rewritten


# -- other ways to keep keys and values -------------------------------------------------------------------------------

aten = torch.ops.aten


def partitioned(value: Tensor, total: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A forward that sums its input and saves it, and a backward that returns it negated."""
    forward, backward = fx.Graph(), fx.Graph()
    x = forward.placeholder("x")
    out = forward.call_function(aten.sum.default, (x,))
    forward.output((out, x))
    saved, grad = backward.placeholder("x"), backward.placeholder("grad")
    backward.output((backward.call_function(aten.neg.default, (saved,)), grad))
    for node, like in ((x, value), (out, total), (saved, value), (grad, total)):
        node.meta = {"val": like}
    return fx.GraphModule({}, forward), fx.GraphModule({}, backward)


def rounded(x: Tensor) -> Tensor:
    """Keys or values [B, H, T, E] as backward reads them."""
    scale = x.abs().amax((2, 3), keepdim=True).float() / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


@settings(max_examples=50, **RELAXED)
@given(st.integers(0, 2**31), st.floats(-20, 20), st.floats(0, 12))
def test_the_error_of_8_bits_is_bounded(seed, size, spread):
    """|x - stored| <= 2^-4 |x| + 2^-10 scale, where 448 scale is the largest magnitude of a head.

    float32 adds less than 2^-20 |x|.
    """
    generator = torch.Generator().manual_seed(seed)
    powers = size + spread * torch.randn(2, 3, 7, 4, generator=generator)
    x = torch.randn(2, 3, 7, 4, generator=generator) * torch.exp2(powers)
    forward, backward = partitioned(x, x.sum())
    store_kv(KV_MODES["fp8"], (0,), forward, backward, 1)
    out, small, scale = forward(x)
    assert small.dtype is torch.float8_e4m3fn and small.shape == x.shape and scale.shape == (2, 3, 1, 1)
    torch.testing.assert_close(scale, x.abs().amax((2, 3), keepdim=True) / 448)
    off = (-backward(small, scale, out)[0] - x).abs()
    assert (off <= (2**-4 + 2**-20) * x.abs() + 2**-10 * scale).all()


def test_values_that_are_all_0_are_0_in_8_bits():
    x = torch.zeros(1, 1, 2, 2)
    forward, backward = partitioned(x, x.sum())
    store_kv(KV_MODES["fp8"], (0,), forward, backward, 1)
    out, *saved = forward(x)
    assert not backward(*saved, out)[0].any()


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_the_loss_is_exact_and_the_gradient_that_of_blocks_recomputed_from_rounded_keys_and_values(inner):
    """Compared with the exact step in which a hook of autograd rounds keys and values when they are saved."""
    torch._dynamo.reset()
    batch, found = data(), []
    length = batch["ids"].shape[1]

    def hold(x: Tensor) -> Tensor:
        return rounded(x) if x.is_floating_point() and x.ndim == 4 and x.shape[2] == length else x

    for kv, compiler in (("keep", "aot_eager"), ("fp8", inner)):
        model = Model()
        options = {"inner": compiler, "scorer": "first", "recompute": "rows", "strict": True}
        step = compile_eager(model, **options, kv=kv)
        step(**batch).backward()
        exact = grads_of(model)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(hold if kv == "keep" else lambda x: x, lambda x: x):
            loss = step(**batch)
        loss.backward()
        found.append((loss.detach(), grads_of(model), exact))
    (loss, expected, exact), (rounded_loss, grads, _) = found
    torch.testing.assert_close(rounded_loss, loss, rtol=1e-12, atol=0)
    assert error(grads, expected) < 1e-9 < error(grads, exact)


def test_rounded_keys_and_values_do_not_inflate_the_gradient_of_large_scores():
    """Attention weights in backward sum to 1: the attention is recomputed, and nothing of it is saved.

    Measured: 0.8 % of the norm; 40000 times the norm if its log-sum-exp is saved.
    """
    torch.manual_seed(0)
    batch, found = data(), []
    for kv in ("keep", "fp8"):
        torch._dynamo.reset()
        model = Model()
        with torch.no_grad():
            for block in model.blocks:
                block.qkv.weight[: 2 * model.lm_head.in_features] *= 20
        compile_eager(model, inner="aot_eager", scorer="first", kv=kv)(**batch).backward()
        found.append(torch.cat([grad.flatten() for grad in grads_of(model).values()]))
    exact, grads = found
    assert 0 < (grads - exact).norm() < 0.1 * exact.norm()


def test_keys_and_values_in_8_bits_take_a_byte_each_and_a_scale_for_each_head():
    report = explained(gpt2(), kv="fp8")
    assert report.rewritten.by_kind()["keys/values"] == 3 * 2 * (B * LENGTH * WIDTH + B * 4 * 4)
    assert report.rewritten.bytes <= 1.15 * report.lower_bound


@pytest.mark.parametrize("kv", ["keep", "fp8", "recompute"])
def test_one_graph_of_any_length_gives_the_gradients_of_graphs_of_each(kv):
    """Keys and values are slices of one product, whose size is a symbol."""
    found = []
    for dynamic in (True, False):
        torch._dynamo.reset()
        model = PositionalAttention()
        options = {"inner": "aot_eager", "scorer": "first", "strict": True, "kv": kv}
        step = torch.compile(model, backend="tokenseek", options=options, dynamic=dynamic)
        for length in (13, 17):
            step(**tokens(length)).backward()
        found.append(grads_of(model))
    assert error(*found) < 1e-12


def test_attentions_that_keep_keys_and_values_unchanged_are_reported():
    """Those of ``Drawing`` have dropout."""
    with pytest.warns(TokenSeekWarning, match="kv='fp8': 2 of 2 attentions keep their keys and values as they are"):
        tokenseek_fx.explain(Drawing(), **tokens(), options={"scorer": "first", "kv": "fp8"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", TokenSeekWarning)
        explained(gpt2(), kv="fp8")


def test_8_bits_need_a_gpu_that_converts_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        expected = pytest.raises(ConfigError, match=r"from compute capability 8\.9 on, this GPU has 8\.0")
        with expected if refused else contextlib.nullcontext():
            if reason := KV_MODES["fp8"].check(torch.device("cuda"), True):
                raise ConfigError(reason)


def test_offloading_on_a_cpu_is_refused():
    with pytest.raises(Exception, match="kv='offload' has no effect: the model is on the CPU"):
        explained(gpt2(), kv="offload")


def test_keys_and_values_that_are_offloaded_are_copied_to_the_host_and_back():
    """On fake tensors of a GPU, which need not exist."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 7, 4, device="cuda")
        forward, backward = partitioned(x, x.sum())
        store_kv(KV_MODES["offload"], (0,), forward, backward, 1)
    saved, key = forward.graph.output_node().args[0][1], backward.graph.find_nodes(op="placeholder")[0]
    assert saved.meta["val"].device.type == key.meta["val"].device.type == "cpu"
    (back,) = key.users
    assert back.meta["val"].device.type == "cuda" and [*back.users] == [backward.graph.output_node().args[0][0]]


# -- recomputed keys and values ---------------------------------------------------------------------------------------


@settings(max_examples=6, **RELAXED)
@given(configurations(), batches(), RATIOS, st.sampled_from(["none", "rows"]))
def test_recomputed_keys_and_values_equal_the_reference(configuration, batch, ratio, recompute):
    """In positional attention with as many key heads as query heads; others are kept, which ``strict`` would refuse."""
    options = {"kv": "recompute", "recompute": recompute, "strict": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*kv='recompute'", category=TokenSeekWarning)
        assert_matches(Transformer(configuration), batch, 1e-12, keep_ratio=ratio, **options)


def tuned_llama(dropout: float = 0.0) -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj"]
    config = peft.LoraConfig(r=5, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
    return peft.get_peft_model(llama(4), config)


@pytest.mark.parametrize("model", [tuned_llama, gpt2], ids=["LoRA", "fused"])
def test_models_that_recompute_keys_and_values_equal_the_reference(model):
    ids = torch.randint(WORDS, (B, T), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    assert_matches(model().double(), batch, 1e-12, logits="drop", kv="recompute")


def test_recomputed_keys_and_values_are_those_of_the_same_draws():
    """Dropout before the factors of LoRA: its draw is kept."""
    model, found = tuned_llama(dropout=0.5).double(), []
    ids = torch.randint(WORDS, (B, T), generator=torch.Generator().manual_seed(0))
    for kv in ("keep", "recompute"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model.zero_grad()
        compile_eager(model, inner="aot_eager", scorer="first", kv=kv, strict=True)(
            input_ids=ids, labels=ids
        ).loss.backward()
        found.append(grads_of(model))
    assert error(*found) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_the_inputs_of_blocks_are_kept_where_they_take_less_than_keys_and_values(name):
    grouped = name == "grouped heads"
    with (
        pytest.warns(TokenSeekWarning, match=r"can't be recomputed from fewer bytes \(attentions: 3\)")
        if grouped
        else contextlib.nullcontext()
    ):
        report = explained(MODELS[name](), kv="recompute")
    tables = 0 if name == "fused" else 2 * LENGTH * 32 * 4  # of the rotary positions, which all blocks share
    expected = (
        {"keys/values": 3 * 2 * B * LENGTH * 2 * 32 * 4}
        if grouped
        else {"block inputs": 3 * B * LENGTH * WIDTH * 4 + tables}
    )
    of_all = {
        kind: size for kind, size in report.rewritten.by_kind().items() if kind in ("keys/values", "block inputs")
    }
    assert of_all == expected
    assert report.recomputed_kv == (
        0 if grouped else 3
    ) and f"recomputed for {report.recomputed_kv} of 3 attentions" in str(report)
    assert report.rewritten.bytes <= 1.15 * report.lower_bound and not report.rewritten.unexplained


def test_the_forward_of_all_tokens_passes_no_keys_and_values_to_blocks_that_recompute_them():
    """They are freed after their attention, so the peak of the forward falls too."""
    for remake in (False, True):
        kv = KV_MODES["recompute" if remake else "keep"]
        program = rewritten(captured(Model(), data()), keep_ratio=0.3, kv=kv, until="split")
        given = [node for node in program[Segments].segments[0].gives if node.meta["val"].ndim == 4]
        assert len(given) == (0 if remake else 4)


def test_under_autocast_recomputed_keys_and_values_are_the_same():
    found = []
    for kv in ("keep", "recompute"):
        torch._dynamo.reset()
        model = Autocast().float()
        compile_eager(model, inner="aot_eager", scorer="first", kv=kv, strict=True)(**data()).backward()
        found.append(grads_of(model))
    assert error(*found) < 1e-6


class Frozen(nn.Module):
    """One attention after a frozen embedding: only keys and values need the weights that computed them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.query, self.key, self.value = (nn.Linear(D, D) for _ in range(3))
        self.embed.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        context = self.context(x)
        q, k, v = self.query(x), self.key(context), self.value(context)
        q, k, v = (y.unflatten(-1, (3, -1)).transpose(1, 2) for y in (q, k, v))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def context(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_a_weight_that_is_changed_before_the_backward_is_noticed(kv):
    """Autograd, which saved it, raises."""
    model = Frozen()
    options = {"inner": "aot_eager", "scorer": "first", "recompute": "none", "kv": kv, "strict": True}
    loss = compile_eager(model, **options)(**tokens())
    with torch.no_grad():
        model.key.weight.mul_(2)
    changed = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with changed if kv == "recompute" else contextlib.nullcontext():
        loss.backward()


@pytest.mark.slow
def test_keys_and_values_recomputed_by_inductor_equal_the_reference():
    assert_matches(Model(), data(), 1e-9, length=data()["ids"].shape[1], inner="inductor", kv="recompute")


class Latent(Frozen):
    """Keys and values projected from a narrow latent, with a linear for each."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.key, self.value = nn.Linear(D, 3), nn.Linear(3, D), nn.Linear(3, D)
        self.embed.requires_grad_(True)

    def context(self, x: Tensor) -> Tensor:
        return self.narrow(x)


def test_a_latent_of_many_heads_is_kept_instead_of_them():
    torch._dynamo.reset()
    report = tokenseek_fx.explain(Latent(), **tokens(), options={"scorer": "strided", "kv": "recompute"})
    saved = report.rewritten.by_kind()
    assert saved["block inputs"] == B * T * 3 * 4 and "keys/values" not in saved


def test_attention_of_a_single_sequence_is_positional_too():
    torch._dynamo.reset()
    ids = torch.zeros(1, T, dtype=torch.long)
    assert tokenseek_fx.explain(Frozen(), ids, ids, options={"kv": "recompute", "strict": True}).recomputed_kv == 1
