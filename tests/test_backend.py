"""The backend as users see it: options, fallbacks, recording, and training set-ups."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import assert_matches, by_reference, compiled, error, grads_of
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx import Config, ConfigError, GraphNotSupported, TokenSeekWarning
from tokenseek_fx.passes.rows.rules import ROWS_RULES

B, T, D, V = 2, 11, 12, 29


class Block(nn.Module):
    """Pre-norm attention and MLP, written by hand."""

    def __init__(self, heads: int = 3, dropout: float = 0.0, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout)


class Model(nn.Module):
    """A language model; ``head`` turns hidden states and labels into what forward returns."""

    def __init__(self, head: Callable | None = None, layers: int = 2, tied: bool = False, **block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position = nn.Embedding(V, D), nn.Parameter(torch.randn(1, T, D))
        self.blocks = nn.ModuleList(Block(**block) for _ in range(layers))
        self.lm_head, self.head = nn.Linear(D, V, bias=False), head
        if tied:
            self.lm_head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self, x, labels) if self.head else self.loss(x, labels)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), labels.flatten())


def data(batch: int = B, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(V, (batch, T), generator=draw) for _ in range(2))
    return {"ids": ids, "labels": labels.masked_fill(torch.rand(batch, T, generator=draw) < 0.3, -100)}


def compile_eager(model, **options):
    defaults = {"inner": "eager", "keep_ratio": 0.4, "scorer": "random", "select": "topk"}
    return torch.compile(model, backend="tokenseek", options={**defaults, **options})


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ration": 0.1}, "Unknown option 'keep_ration'. Did you mean 'keep_ratio'?"),
        ({"keep_ratio": 0}, "keep_ratio=0: expected a number with 0 < keep_ratio <= 1."),
        ({"keep_ratio": 1.5}, "keep_ratio=1.5: expected a number with 0 < keep_ratio <= 1."),
        ({"keep_ratio": "10%"}, "keep_ratio='10%': expected a number"),
        ({"keep_tokens": 0}, "keep_tokens=0: expected an integer of at least 1."),
        ({"keep_tokens": 5, "keep_ratio": 0.5}, "set only one of them"),
        ({"scorer": "randon"}, "scorer='randon': expected one of 'tokenseek', 'attention'"),
        ({"scorer": "randon"}, "Did you mean 'random'?"),
        ({"select": "top-k"}, "select='top-k': expected one of 'topk', 'sample'. Did you mean 'topk'?"),
        ({"gradient_of": "block"}, "gradient_of='block': expected one of 'last_block', 'head'. Did you mean"),
        ({"kv_grad": "none"}, "kv_grad='none': expected one of 'selected', 'all'."),
        ({"kv": "fp-8"}, "kv='fp-8': expected one of 'keep', 'recompute', 'offload', 'fp8'. Did you mean 'fp8'?"),
        ({"kv": "fp8", "inner": "eager"}, "kv='fp8' has no effect: inner='eager'."),
        ({"kv": "fp8", "kv_grad": "all"}, "kv='fp8' has no effect: kv_grad='all' saves the inputs of blocks"),
        ({"report_loss": "all"}, "report_loss='all': expected one of 'full', 'kept'."),
        ({"alpha": -1}, "alpha=-1: expected a number of at least 0."),
        ({"mix": 1.1}, "mix=1.1: expected a number from 0 to 1."),
        ({"weight_clip": 0.5}, "weight_clip=0.5: expected a number of at least 1."),
        ({"labelled_first": "half"}, "labelled_first='half': expected a number from 0 to 1."),
        ({"keep_label": 1}, "keep_label=1: expected True or False."),
        ({"pinned": 3}, "pinned=3: expected a list of positions."),
        ({"attention_layers": "middle"}, "attention_layers='middle': expected one of 'last', 'first', 'all'."),
        ({"attention_layers": []}, "attention_layers=[]: expected 'last', 'first', 'all' or a list of numbers."),
        ({"inner": "inductr"}, "inner='inductr': expected one of 'inductor', 'aot_eager', 'eager'. Did you mean"),
        ({"logits": "none"}, "logits='none': expected one of 'keep', 'drop'."),
        ({"strict": 1}, "strict=1: expected True or False."),
        ({"seed": 0.5}, "seed=0.5: expected an integer or None."),
        ({"mode": "fast"}, "mode='fast': expected one of 'default'"),
        ({"inductor_options": {"max_autotun": True}}, "Did you mean 'max_autotune'?"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError) as caught:
        Config.from_options(options)
    assert message in str(caught.value)


def test_a_bad_option_reaches_the_user_of_torch_compile():
    with pytest.raises(Exception, match="Did you mean 'keep_ratio'"):
        torch.compile(Model(), backend="tokenseek", options={"keepratio": 0.1})(**data())


def test_the_backend_as_a_callable():
    model, chosen = Model(), Config(keep_tokens=3, inner="eager", scorer="first")
    with tokenseek_fx.record() as rec:
        torch.compile(model, backend=tokenseek_fx.backend(chosen))(**data()).backward()
    assert rec[0].indices.tolist() == [[0, 1, 2]] * B


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [("first", [0, 1, 2, 3]), ("last", [7, 8, 9, 10]), ("strided", [2, 5, 8, 10])],
)
def test_scorers(scorer, expected):
    with tokenseek_fx.record() as rec:
        compile_eager(Model(), keep_ratio=0.3, scorer=scorer)(**data())
    assert rec[0].indices.tolist() == [expected] * B
    assert rec[0].scores.shape == (B, T)


def test_a_user_defined_scorer():
    with tokenseek_fx.record() as rec:
        scorer = lambda inputs: torch.arange(inputs.tokens).remainder(4).expand(inputs.batch, -1).float()  # noqa: E731
        compile_eager(Model(), keep_tokens=2, keep_ratio=None, scorer=scorer)(**data())
    assert rec[0].indices.tolist() == [[3, 7]] * B


def test_a_seed_reproduces_the_selections_and_leaves_torchs_generator_alone():
    def selections(seed):
        torch._dynamo.reset()
        step = compile_eager(Model(), seed=seed)
        torch.seed()
        with tokenseek_fx.record() as rec:
            state = torch.get_rng_state()
            for _ in range(3):
                step(**data())
        assert seed is None or torch.equal(state, torch.get_rng_state())
        return [s.indices.tolist() for s in rec]

    first = selections(7)
    assert first == selections(7)
    assert first[0] != first[1]
    assert first != selections(8)
    assert selections(None) != selections(None)


# -- recording --------------------------------------------------------------------------------------------------------


def test_record_of_several_models_and_nesting():
    one, two = compile_eager(Model(), keep_ratio=0.2), compile_eager(Model(layers=1), keep_ratio=0.5)
    with tokenseek_fx.record() as outer:
        one(**data())
        with tokenseek_fx.record() as inner:
            two(**data())
    one(**data())
    assert [s.indices.shape[1] for s in outer] == [3, 6]
    assert [s.indices.shape[1] for s in inner] == [6]
    assert all((s.indices.diff(dim=1) > 0).all() and s.indices.dtype == torch.int64 for s in outer)


def test_record_is_per_thread():
    step, found = compile_eager(Model()), {}
    step(**data())

    def work(name, times):
        with tokenseek_fx.record() as rec:
            for _ in range(times):
                step(**data())
        found[name] = len(rec)

    threads = [threading.Thread(target=work, args=(i, i + 1)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 1, 1: 2, 2: 3}


# -- nothing to train -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_untouched(context):
    model = Model(lambda self, x, labels: (self.loss(x, labels), self.lm_head(x))).eval()
    expected = model(**data())
    with context(), tokenseek_fx.record() as rec, warnings.catch_warnings():
        warnings.simplefilter("error", TokenSeekWarning)
        loss, logits = compile_eager(model)(**data())
    torch.testing.assert_close((loss, logits), tuple(x.detach() for x in expected))
    assert not rec


def test_nothing_trainable_is_untouched():
    model = Model().requires_grad_(False)
    with tokenseek_fx.record() as rec:
        assert compile_eager(model, strict=True)(**data()) == model(**data())
    assert not rec


# -- what can't be rewritten ------------------------------------------------------------------------------------------


class NoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).sum()


class Split(Model):
    def forward(self, ids, labels=None):
        x = self.blocks[0](self.embed(ids) + self.position)
        torch._dynamo.graph_break()
        return self.loss(self.blocks[1](x), labels)


class PartOfTheTokens(Model):
    def loss(self, x, labels):
        return F.cross_entropy(self.lm_head(x)[:, ::2].flatten(0, 1), labels[:, ::2].flatten())


class RegressionOnAPart(Model):
    def loss(self, x, labels):
        return F.mse_loss(x[:, 1:], x[:, :-1].detach())


class DifferencesOfRows(Model):
    def loss(self, x, labels):
        return F.mse_loss(x[:, 1:] - x[:, :-1], torch.ones_like(x[:, 1:]))


@pytest.mark.parametrize("form", [RegressionOnAPart, PartOfTheTokens])
def test_a_loss_over_a_part_of_the_tokens(form):
    assert_matches(form(), data(), 1e-9, length=T)


REFUSED = {
    "no attention": (NoAttention, lambda: {"x": torch.randn(3, 4)}, "No attention was found"),
    "graph break": (Split, data, r"Dynamo split the model at .*test_backend.py:\d+"),
    "differences of rows": (DifferencesOfRows, data, "rows of different tokens meet at aten.sub.Tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_falls_back_with_one_warning_that_says_why_and_where(case):
    build, inputs, message = REFUSED[case]
    model, batch = build(), inputs()
    plain = copy.deepcopy(model)
    with pytest.warns(TokenSeekWarning, match=message) as caught:
        compile_eager(model)(**batch).backward()
    assert len([w for w in caught if w.category is TokenSeekWarning]) == 1
    assert "test_backend.py:" in str(caught[0].message)
    plain(**batch).backward()
    assert error(grads_of(model), grads_of(plain)) < 1e-12


@pytest.mark.parametrize("case", REFUSED)
def test_strict_raises(case):
    build, inputs, message = REFUSED[case]
    with pytest.raises(Exception, match=message) as caught:
        compile_eager(build(), strict=True)(**inputs())
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), GraphNotSupported)


@pytest.mark.injects_faults
def test_an_internal_error_falls_back_and_names_its_place(monkeypatch):
    def broken(call):
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(ROWS_RULES, torch.ops.aten.gelu.default, broken)
    with pytest.warns(
        TokenSeekWarning, match=r"internal error, ZeroDivisionError: a bug at blocks.0 \(test_backend.py:"
    ):
        compile_eager(Model())(**data()).backward()


def test_one_token_is_plain_training():
    model = nn.TransformerEncoderLayer(D, 3, 2 * D, dropout=0.0, batch_first=True).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TokenSeekWarning)
        compile_eager(model)(torch.randn(4, 1, D, dtype=torch.float64)).sum().backward()
    assert model.linear1.weight.grad is not None


# -- losses and outputs -----------------------------------------------------------------------------------------------


def shifted(self, x, labels):
    logits = self.lm_head(x)
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


def shifted_contiguous(self, x, labels):
    logits = self.lm_head(x).float()[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, V), labels[..., 1:].contiguous().view(-1)).double()


def over_own_values(self, x, labels):
    """Every token attends to some values of its own."""
    values = torch.stack([x, 2 * x, x.tanh()], 2)
    shares = (x.unsqueeze(2) @ values.transpose(-1, -2)).softmax(-1)
    return self.loss((shares @ values).squeeze(2), labels)


HEADS = {
    "mean": None,
    "attention over own values": over_own_values,
    "shifted": shifted,
    "shifted, contiguous": shifted_contiguous,
    "sum": lambda self, x, y: F.cross_entropy(self.lm_head(x).flatten(0, 1), y.flatten(), reduction="sum") / 100,
    "classes second": lambda self, x, y: F.cross_entropy(self.lm_head(x).transpose(1, 2), y),
    "smoothing": lambda self, x, y: F.cross_entropy(self.lm_head(x).flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "weights": lambda self, x, y: F.cross_entropy(
        self.lm_head(x).flatten(0, 1), y.flatten(), weight=torch.linspace(0.1, 2, V, dtype=x.dtype)
    ),
    "nll": lambda self, x, y: F.nll_loss(F.log_softmax(self.lm_head(x).flatten(0, 1), -1), y.flatten()),
    "per token": lambda self, x, y: F.cross_entropy(self.lm_head(x).transpose(1, 2), y, reduction="none").mean(),
    "padded vocabulary, shifted": lambda self, x, y: F.cross_entropy(
        self.lm_head(x)[:, :-1, : V - 2].flatten(0, 1), y[:, 1:].flatten().clamp(max=V - 3)
    ),
    "shifted, padded vocabulary": lambda self, x, y: F.cross_entropy(
        self.lm_head(x)[:, :-1].reshape(-1, V)[:, : V - 2], y[:, 1:].flatten().clamp(max=V - 3)
    ),
    "padded vocabulary, classes second": lambda self, x, y: F.cross_entropy(
        self.lm_head(x).transpose(1, 2)[:, : V - 2], y.clamp(max=V - 3)
    ),
    "binary cross entropy": lambda self, x, y: F.binary_cross_entropy(x.sigmoid(), torch.full_like(x, 0.3)),
    "binary cross entropy, sum": lambda self, x, y: F.binary_cross_entropy(
        x.sigmoid(), torch.full_like(x, 0.3), reduction="sum"
    ),
    "mse": lambda self, x, y: F.mse_loss(x, torch.zeros_like(x)),
    "l1 sum": lambda self, x, y: F.l1_loss(x, torch.ones_like(x), reduction="sum"),
    "mean pool": lambda self, x, y: F.cross_entropy(self.lm_head(x.mean(1)), y[:, 0].clamp(0)),
    "first token": lambda self, x, y: F.cross_entropy(self.lm_head(x[:, 0]), y[:, 0].clamp(0)),
    "plain mean": lambda self, x, y: (x**2).mean(),
}


@pytest.mark.parametrize("head", HEADS)
def test_losses(head):
    tol = 1e-6 if "contiguous" in head else 1e-9  # this head casts its logits to float32
    scorer = "first" if head == "first token" else "random"
    assert_matches(Model(HEADS[head]), data(), tol, length=T, scorer=scorer)


class Soft(Model):
    def forward(self, ids, shares):
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), shares.flatten(0, 1))


def test_class_probabilities_as_targets():
    shares = torch.rand(B, T, V, dtype=torch.float64).softmax(-1)
    assert_matches(Soft(), {"ids": data()["ids"], "shares": shares}, 1e-9, length=T)


@pytest.mark.parametrize(("weight", "bias"), [(False, True), (True, False)])
def test_a_part_of_the_head_is_trained(weight, bias):
    """Only biases (BitFit, PEFT's ``bias="all"``), or all parameters but biases."""
    model = Model()
    model.lm_head = nn.Linear(D, V).double()
    model.lm_head.weight.requires_grad_(weight)
    model.lm_head.bias.requires_grad_(bias)
    assert_matches(model, data(), 1e-9, length=T)


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_half_logits_is_computed_in_float32(dtype, select):
    """The sum over tokens would overflow in float16, and be rounded in bfloat16."""
    model = Model(lambda self, x, y: F.cross_entropy((self.lm_head(x) * 8000).flatten(0, 1), y.flatten())).float()
    for report in ("kept", "full"):
        with torch.autocast("cpu", dtype):
            run = compiled(model, data(), report_loss=report, select=select, scorer="loss", keep_ratio=0.9)
            weights = run.selection.weights
            expected = (
                by_reference(model, data(), run.indices, T, weights).loss if report == "kept" else model(**data())
            )
        assert run.loss.dtype is expected.dtype
        torch.testing.assert_close(run.loss.detach(), expected.detach(), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_batch_of_one():
    assert_matches(Model(), data(1), 1e-9, length=T)


def test_loss_outside_the_graph():
    """Values in full, gradient through the selected rows."""
    model = Model(lambda self, x, labels: self.lm_head(x))
    with tokenseek_fx.record() as rec:
        logits = compile_eager(model, strict=True)(data()["ids"])
    torch.testing.assert_close(logits.detach(), model(data()["ids"]).detach(), rtol=0, atol=1e-12)
    (logits**2).mean().backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    with tokenseek_fx.reference.ditching(expected, rec[0].indices, length=T):
        (expected(data()["ids"]) ** 2).mean().backward()
    assert error(grads_of(model), grads_of(expected)) < 1e-9


def test_a_term_of_another_output_is_refused_instead_of_dropped():
    model = Model(lambda self, x, labels: {"loss": self.loss(x, labels), "hidden": x, "n": 3, "none": None})
    out = compile_eager(model, strict=True)(**data())
    with pytest.raises(GraphNotSupported, match="A gradient reached an output of shape"):
        (out["loss"] + out["hidden"].sum()).backward()
    torch.testing.assert_close(out["hidden"], model(**data())["hidden"].detach(), rtol=0, atol=1e-12)
    assert (out["n"], out["none"]) == (3, None)


class Pass(torch.autograd.Function):
    """Passes on several values at once, as DDP and FSDP do with a module's outputs; a missing gradient is ``None``."""

    @staticmethod
    def forward(ctx, *values):
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in values)

    @staticmethod
    def backward(ctx, *grads):
        return grads


def test_other_outputs_can_be_read_changed_and_passed_on():
    model = Model(lambda self, x, labels: (self.loss(x, labels), x))
    plain = copy.deepcopy(model)
    loss, hidden = Pass.apply(*compile_eager(model, keep_ratio=1.0, logits="drop", strict=True)(**data()))
    hidden.detach().numpy()
    loss.backward()
    plain(**data())[0].backward()
    assert error(grads_of(model), grads_of(plain)) < 1e-9
    _, hidden = compile_eager(model, strict=True)(**data())
    hidden.mul_(2)[0] = 0


# -- training set-ups -------------------------------------------------------------------------------------------------


def test_tied_weights():
    assert_matches(Model(tied=True), data(), 1e-9, length=T)


def test_frozen_parameters():
    model = Model()
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    run = assert_matches(model, data(), 1e-9, length=T)
    assert not any("blocks.0" in name for name in run.grads)


def test_gradient_accumulation_and_several_forwards_before_backward():
    model, batches = Model(), [data(seed=i) for i in range(3)]
    expected = copy.deepcopy(model)
    step = compile_eager(model, strict=True)
    with tokenseek_fx.record() as rec:
        sum(step(**batch) for batch in batches[:2]).backward()
        step(**batches[2]).backward()
    for batch, selection in zip(batches, rec, strict=True):
        with tokenseek_fx.reference.ditching(expected, selection.indices, length=T):
            expected(**batch).backward()
    assert error(grads_of(model), grads_of(expected)) < 1e-9


def test_buffers_written_in_the_forward():
    class Counts(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros(D, dtype=torch.float64))

        def forward(self, ids, labels=None):
            self.steps += 1
            with torch.no_grad():
                self.mean.mul_(0.9).add_(self.embed(ids).mean((0, 1)), alpha=0.1)
            return super().forward(ids, labels)

    model, plain = Counts(), Counts()
    step = compile_eager(model, strict=True)
    for seed in range(3):
        step(**data(seed=seed)).backward()
        plain(**data(seed=seed))
    assert model.steps == 3
    torch.testing.assert_close(model.mean, plain.mean, rtol=0, atol=1e-14)


def test_no_grad_regions_carry_no_gradient():
    class Stopped(Model):
        def loss(self, x, labels):
            with torch.no_grad():
                scale = self.lm_head(x).abs().amax(-1, keepdim=True)
            return F.cross_entropy((self.lm_head(x) / scale).flatten(0, 1), labels.flatten())

    assert_matches(Stopped(), data(), 1e-9, length=T)


def test_gradient_checkpointing_in_the_model_gives_the_same_gradient():
    class Checkpointed(Model):
        def forward(self, ids, labels=None):
            x = self.embed(ids) + self.position
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.loss(x, labels)

    run = compiled(Checkpointed(), data(), inner="eager", scorer="strided")
    assert error(run.grads, compiled(Model(), data(), inner="eager", scorer="strided").grads) < 1e-12


class Square(torch.autograd.Function):
    """A custom function whose backward is not the derivative of its forward: inlined, its gradient would differ."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 7 * ctx.saved_tensors[0] * grad


def test_custom_autograd_functions_keep_their_backward():
    model = Model(lambda self, x, labels: self.loss(Square.apply(x), labels))
    for inner in ("eager", "aot_eager"):
        assert_matches(model, data(), 1e-9, length=T, inner=inner)


def test_writes_through_views_keep_their_gradient():
    def head(self, x, labels):
        y = torch.zeros_like(x)
        y[..., : D // 2] = x[..., D // 2 :]
        y[..., D // 2 :].copy_(x[..., : D // 2] * 2)
        return self.loss(y.mul_(1.5), labels)

    assert_matches(Model(head), data(), 1e-9, length=T)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    class Inside(Model):
        def forward(self, ids, labels=None):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(ids, labels)

    model = (Inside if inside else Model)().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        run = compiled(model, data(), inner="eager")
        expected = by_reference(model, data(), run.indices, T)
    assert error(run.grads, expected.grads) < 3e-2  # bfloat16: sums over rows in another order


def test_dropout_is_fresh_in_each_stream_and_right_in_expectation():
    """With p > 0 after the last attention the mean of many gradients tends to the gradient without dropout masks."""
    model = Model(lambda self, x, labels: F.dropout(x, 0.5).mul(self.position).sum() / 100, layers=1)
    batch, step = data(), compile_eager(model, strict=True, scorer="strided")
    for _ in range(400):
        step(**batch).backward()
    mean = {name: grad / 400 for name, grad in grads_of(model).items()}
    still = Model(lambda self, x, labels: x.mul(self.position).sum() / 100, layers=1)
    expected = compiled(still, batch, inner="eager", scorer="strided", keep_ratio=0.4).grads
    assert error(mean, expected) < 0.15
    assert error({n: g.roll(1, 0) for n, g in mean.items()}, expected) > 0.3  # the tolerance tells gradients apart


def test_an_encoder_of_torch():
    for batch_first in (True, False):
        layer = nn.TransformerEncoderLayer(D, 3, 2 * D, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
        torch._dynamo.reset()
        x = torch.randn((3, T, D) if batch_first else (T, 3, D), dtype=torch.float64)
        with tokenseek_fx.record() as rec:
            out = compile_eager(model, strict=True)(x)
        out.square().mean().backward()
        expected = copy.deepcopy(model)
        expected.zero_grad()
        assert rec[0].indices.shape == (3, 5)
        with tokenseek_fx.reference.ditching(expected, rec[0].indices, length=T):
            expected(x).square().mean().backward()
        assert error(grads_of(model), grads_of(expected)) < 1e-9


def test_lengths_that_change():
    """The second length makes Dynamo's shapes dynamic; every one is exact."""
    model = Model(lambda self, x, labels: self.loss(x, labels))
    model.position = nn.Parameter(torch.randn(1, 1, D, dtype=torch.float64))
    expected = copy.deepcopy(model)
    step = compile_eager(model, strict=True)
    for batch, length in [(2, 11), (2, 7), (3, 10), (4, 5)]:
        inputs = {"ids": torch.randint(V, (batch, length)), "labels": torch.randint(V, (batch, length))}
        model.zero_grad(), expected.zero_grad()
        with tokenseek_fx.record() as rec:
            step(**inputs).backward()
        assert rec[0].indices.shape == (batch, -(-length * 4 // 10))
        with tokenseek_fx.reference.ditching(expected, rec[0].indices, length=length):
            expected(**inputs).backward()
        assert error(grads_of(model), grads_of(expected)) < 1e-9
