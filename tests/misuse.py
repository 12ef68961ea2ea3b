"""Mistakes of users: a small function provokes each, and ``docs/errors.md`` lists the outcomes.

``python tests/misuse.py`` prints the page. A case takes options of the backend, so that it can run with
``strict=True``.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import zoo
from test_custom_op import model_and_batch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import tokenseek_fx
import tokenseek_fx.integrations
from tokenseek_fx import Config, GraphNotSupported, ScoreInputs, TokenSeekWarning, needs
from tokenseek_fx.scorers import SCORERS

VOCAB, WIDTH, B, T = 11, 8, 2, 6
Provoke = Callable[..., object]


@dataclass(frozen=True)
class Misuse:
    """``what``: the mistake. ``provoke(**options)`` makes it. ``remedy``: what to do instead."""

    section: str
    what: str
    remedy: str
    provoke: Provoke


@dataclass(frozen=True)
class Outcome:
    """Class and message of the error or, without one, of the warning or of ``explain``; empty: no message."""

    kind: str = ""
    text: str = ""


CASES: list[Misuse] = []


def misuse(section: str, what: str, remedy: str) -> Callable[[Provoke], Provoke]:
    """List a function as a case."""

    def register(provoke: Provoke) -> Provoke:
        CASES.append(Misuse(section, what, remedy, provoke))
        return provoke

    return register


@functools.cache
def outcome(case: Misuse, strict: bool = False) -> Outcome:
    """The outcome of a case."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = case.provoke(**({"strict": True} if strict else {}))
        except Exception as error:
            cause = getattr(error, "inner_exception", error)
            kind = GraphNotSupported if isinstance(cause, GraphNotSupported) else type(cause)
            return Outcome(kind.__name__, _portable(str(cause)))
    said = [str(warning.message) for warning in caught if warning.category is TokenSeekWarning]
    if said:
        return Outcome(TokenSeekWarning.__name__, _portable(" ".join(said)))
    return Outcome("explain", _portable(result)) if isinstance(result, str) else Outcome()


def _portable(text: str) -> str:
    """The first paragraph on one line, without paths and line numbers."""
    paragraph = " ".join(re.split(r"\n\s*\n", text.strip())[0].split())
    return re.sub(r"[^\s(]*(misuse|test_custom_op)\.py:\d+", "FILE:LINE", paragraph)


# -- the models -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A language model: its loss and its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.hidden(self.embed(ids)))
        return self.loss(logits, labels), logits

    def hidden(self, x: Tensor) -> Tensor:
        return self.block(x)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Grouped(Model):
    """Four heads that share one key and one value."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

    def hidden(self, x: Tensor) -> Tensor:
        query, key, value = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return x + mixed.transpose(1, 2).flatten(2)


class Mixing(Grouped):
    """Every token gets the mean of all tokens too."""

    def hidden(self, x: Tensor) -> Tensor:
        mean = torch.full((T, T), 1 / T)
        return super().hidden(x + mean @ self.block.linear1.weight[:WIDTH, 0].mul(x))


class WithoutLoss(Model):
    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.head(self.hidden(self.embed(ids)))


def ids() -> Tensor:
    return torch.arange(B * T).view(B, T) % VOCAB


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="tokenseek", options={"inner": "eager", **options})


def forward(model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    return compiled(model, **options)(ids(), ids())


def selections(run: Callable[[], object]) -> list[tokenseek_fx.Selection]:
    with tokenseek_fx.record() as recording:
        run()
    return recording


def train(model: nn.Module, **options: Any) -> None:
    forward(model, **options)[0].backward()


# -- options ----------------------------------------------------------------------------------------------------------


def option(what: str, remedy: str, **options: Any) -> None:
    """A case of invalid options."""
    misuse("Options", what, remedy)(lambda **strict: Config.from_options({**options, **strict}))


option("an option that doesn't exist", "correct the name", keep_ration=0.1)
option("a ratio that keeps nothing", "a ratio above 0; each sequence keeps at least one token", keep_ratio=0)
option("a ratio above 1", "a fraction, not a percentage", keep_ratio=10)
option("a ratio that isn't a number", "a number", keep_ratio="10%")
option("a number of tokens that keeps nothing", "1 or more", keep_tokens=0)
option("two options that contradict each other", "set one of them", keep_ratio=0.5, keep_tokens=64)


@misuse("Options", "a scorer that doesn't exist", "one of the list, or `register_scorer`")
def _(**options):
    ours = {name: make for name, make in SCORERS.items() if make.__module__.startswith("tokenseek_fx.")}
    with mock.patch.dict(SCORERS, ours, clear=True):  # another test may have registered some
        Config.from_options({"scorer": "randon", **options})


option("a value that an option doesn't accept", "one of the list", logits="none")
option("a switch that is neither True nor False", "True or False", keep_label="yes")
option("a number out of range", "a number in the range", mix=1.5)
option("positions that aren't a list", "a list", pinned=3)
option("a score without terms", "at least one factor above 0", scorer="tokenseek", alpha=0, beta=0)
option(
    "an option of Inductor with another compiler",
    'remove it, or `inner="inductor"`',
    inner="eager",
    mode="max-autotune",
)
option("a value that `recompute` doesn't accept", "one of the list, or bytes", recompute="all")
option("a mode of keys and values that doesn't exist", "one of the list", kv="fp16")
option("a mode of keys and values without saved tensors", "another `inner`", inner="eager", kv="recompute")
option("a mode of keys and values that get gradient", "remove one of them", kv_grad="all", kv="recompute")
option("a number of rounds below 1", "1 or more", rounds=0)
option("the loss of the kept tokens, in rounds", "remove one of them", rounds=4, report_loss="kept")
option("an amount of memory with an unknown unit", "GiB, not GB", memory_budget="8GB")
option("chunks of 0 bytes", "1 or more", chunk_bytes=0)
option(
    "a memory budget with another compiler",
    'remove it, or `inner="inductor"`',
    inner="aot_eager",
    memory_budget="8GiB",
)
option("an option of another scorer", "remove it, or choose that scorer", scorer="random", alpha=2.0)
option("an option of another selection", 'remove it, or `select="sample"`', select="topk", mix=0.5)
option("an option of Inductor that doesn't exist", "correct the name", inductor_options={"max_autotun": True})


@misuse("Options", "a `Config` instead of the dict of options", "`backend=tokenseek_fx.backend(config)`")
def _(**options):
    torch.compile(Model(), backend="tokenseek", options=Config())(ids(), ids())


@misuse("Options", "a dict instead of the `Config`", "`options={...}`, or a `Config`")
def _(**options):
    tokenseek_fx.backend({"keep_ratio": 0.1})  # type: ignore[arg-type]


@misuse("Options", "`backend=tokenseek_fx.backend`, not called", "`tokenseek_fx.backend()`")
def _(**options):
    torch.compile(Model(), backend=tokenseek_fx.backend)(ids(), ids())


@misuse("Options", "`mode` and `options` of `torch.compile`", 'the mode as an option: `{"mode": ...}`')
def _(**options):
    torch.compile(Model(), backend="tokenseek", mode="max-autotune", options={"keep_ratio": 0.1})


class Open(Model):
    """Accepts any keyword argument, as many models do."""

    def forward(self, ids: Tensor, labels: Tensor, **ignored: Any) -> Any:
        return super().forward(ids, labels)


@misuse("Options", "an option passed to `explain` as an input of the model", "`options={...}`")
def _(**options):
    tokenseek_fx.explain(Open(), ids(), ids(), keep_ratio=0.5, options=options)


@misuse("Options", "a backend that doesn't exist", '`backend="tokenseek"`')
def _(**options):
    torch.compile(Model(), backend="tokenseeker")(ids(), ids())


@misuse("Options", "attentions that the model doesn't have", "numbers of existing attentions")
def _(**options):
    forward(Model(), scorer="attention", attention_layers=[7], **options)


@misuse("Options", "more ratios than token axes", "one ratio, or one for each axis")
def _(**options):
    forward(Model(), keep_ratio=[0.5, 0.25], **options)


@misuse("Options", "a pinned position beyond the end", "a position in the sequence")
def _(**options):
    forward(Model(), pinned=[0, 99], **options)


@misuse("Options", "more pinned positions than kept tokens", "keep more tokens; the highest scores are kept")
def _(**options):
    forward(Model(), pinned=[0, 1, 2], keep_tokens=2, **options)


@misuse("Options", "keys and values offloaded on a CPU", '`kv="recompute"`, or remove it')
def _(**options):
    forward(Model(), inner="aot_eager", kv="offload", **options)


@misuse("Options", "fewer bytes for `recompute` than must be saved", "the bytes in the message")
def _(**options):
    forward(Model(), inner="aot_eager", recompute=64, **options)


@misuse("Options", "recomputed keys and values that grouped heads make small", "remove it")
def _(**options):
    forward(Grouped(), inner="aot_eager", kv="recompute", **options)


@misuse("Options", "rounds of tokens that attend in both directions", "`rounds=1`")
def _(**options):
    forward(Model(), rounds=2, keep_ratio=0.5, **options)


@misuse("Options", "rounds of tokens that are mixed in both directions", "`rounds=1`")
def _(**options):
    train(Mixing(), rounds=2, keep_ratio=0.5, **options)


# -- scorers ----------------------------------------------------------------------------------------------------------


def scorer(what: str, remedy: str) -> Callable[[Any], Any]:
    """A case of an invalid scorer."""

    def register(score: Any) -> Any:
        misuse("Scorers", what, remedy)(lambda **options: forward(Model(), scorer=score, **options))
        return score

    return register


@scorer("a scorer that returns scores of the wrong shape", "`scores.expand(inputs.batch, inputs.tokens)`")
def _(inputs: ScoreInputs):
    return torch.zeros(inputs.tokens)


@scorer("a scorer that returns integers", "`scores.float()`")
def _(inputs: ScoreInputs):
    return torch.arange(inputs.tokens).expand(inputs.batch, -1)


@scorer("a scorer that returns no tensor", "return the scores")
def _(inputs: ScoreInputs):
    return None


@scorer("a scorer on another device", "create tensors with `device=inputs.device`")
def _(inputs: ScoreInputs):
    return torch.zeros(inputs.batch, inputs.tokens, device="meta")


@scorer("a scorer that reads a signal without requesting it", '`@needs("loss")`')
def _(inputs: ScoreInputs):
    return inputs.loss.log()


@scorer("a scorer that branches on a value", "`torch.where`")
def _(inputs: ScoreInputs):
    labelled = inputs.mask("labelled").float()
    return labelled if labelled.sum() > 3 else -labelled


scorer("a factory instead of a scorer", "its name, or call it")(tokenseek_fx.scorers.SCORERS["random"])


@misuse("Scorers", "a scorer that requests a signal that doesn't exist", "one of the list")
def _(**options):
    needs("entropy")


@misuse("Scorers", "`@needs` without its signals", '`@needs("loss")`')
def _(**options):
    needs(lambda inputs: inputs.loss)  # type: ignore[arg-type]


@misuse("Scorers", "a name registered twice", "another name")
def _(**options):
    tokenseek_fx.register_scorer("random", tokenseek_fx.scorers.SCORERS["first"])


# -- models -----------------------------------------------------------------------------------------------------------


@misuse("Models", "a model without attention", "plain training; token selection needs a transformer")
def _(**options):
    compiled(nn.Sequential(nn.Linear(3, 3)), **options)(torch.randn(2, 3)).sum().backward()


@torch.library.custom_op("tokenseek_misuse::flash", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


flash.register_fake(lambda q, k, v: torch.empty_like(q))
flash.register_autograd(lambda ctx, grad: (grad, grad, grad))  # the values don't matter here


@misuse("Models", "attention as a single operation of a package, as in flash-attn", "`sdpa` or `eager` attention")
def _(**options):
    class Flash(Model):
        def hidden(self, x):
            return flash(x, x, x)

    train(Flash(), **options)


@misuse("Models", '`attn_implementation="flash_attention_2"` without its package', "`sdpa` or `eager` attention")
def _(**options):
    zoo.build("llama").set_attn_implementation("flash_attention_2")


@misuse("Models", "attention that Dynamo can't trace", "`sdpa` or `eager` attention")
def _(**options):
    class Untraceable(Model):
        def hidden(self, x):
            return torch.compiler.disable(self.block)(x)

    train(Untraceable(), **options)


@misuse("Models", "a graph break", "remove its cause, here `.item()`")
def _(**options):
    class Broken(Model):
        def forward(self, ids, labels):
            x = self.hidden(self.embed(ids))
            self.norm = x.norm().item()
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()), x

    train(Broken(), **options)


@misuse("Models", "a hook on a tensor of the forward (`register_hook`)", "a `torch.autograd.Function`")
def _(**options):
    class Hooked(Model):
        def hidden(self, x):
            x.register_hook(lambda grad: grad.clamp(-1, 1))
            return self.block(x)

    train(Hooked(), **options)


@misuse("Models", "a backward hook on a module of the model", "a `torch.autograd.Function`, or a hook on a parameter")
def _(**options):
    model = Model()
    model.block.register_full_backward_hook(lambda *args: None)
    train(model, **options)


@misuse("Models", "attention of the last token alone", "an attention with a query for every token")
def _(**options):
    class Last(Model):
        def hidden(self, x):
            return x + F.scaled_dot_product_attention(x[:, -1:], x, x)

    train(Last(), **options)


@misuse("Models", "a `torch.func` transform in the forward", "batched operations")
def _(**options):
    class Mapped(Model):
        def hidden(self, x):
            return torch.func.vmap(torch.sin)(self.block(x))

    train(Mapped(), **options)


@misuse("Models", "the token axis split before attention", "attention over all tokens, with a mask")
def _(**options):
    class Halves(Model):
        def hidden(self, x):
            return torch.cat([self.block(x[:, :2]), self.block(x[:, 2:])], 1)

    train(Halves(), **options)


@misuse("Models", "tokens split into windows before attention", "attention over all tokens, with a mask")
def _(**options):
    class Windows(Model):
        def hidden(self, x):
            return self.block(x.reshape(2 * B, T // 2, WIDTH)).reshape(B, T, WIDTH)

    train(Windows(), scorer="random", **options)


@misuse("Models", "a forward that writes to a parameter", "a buffer")
def _(**options):
    class Writing(Model):
        def hidden(self, x):
            with torch.no_grad():
                self.head.bias.mul_(0.9)
            return self.block(x)

    train(Writing(), **options)


@misuse(
    "Models", "a write under `no_grad`, or through `detach()` or `.data`, to a value with gradient", "an expression"
)
def _(**options):
    class Hidden(Model):
        def hidden(self, x):
            with torch.no_grad():
                x.clamp_(-1, 1)
            return super().hidden(x)

    train(Hidden(), **options)


@misuse("Models", "a forward that writes to one of two buffers that share memory", "one buffer")
def _(**options):
    class Sharing(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("sums", torch.zeros(2, WIDTH))
            self.register_buffer("last", self.sums[1])

        def hidden(self, x):
            self.last.copy_(x.detach()[0, 0])
            return super().hidden(x + self.sums[1])

    train(Sharing(), **options)


@misuse("Models", "modules of a model compiled separately", "compile the model")
def _(**options):
    model = Model()
    model.block = compiled(model.block, **options)
    model(ids(), ids())


@misuse("Models", "model and batch on different devices", "move the batch")
def _(**options):
    forward(Model().to("meta"))


@misuse(
    "Models",
    "a custom operation without a rule",
    "none needed: it runs over all tokens, exactly; [two rules](extend.md) save more",
)
def _(**options):
    model, batch = model_and_batch("gate")
    with contextlib.redirect_stdout(None):
        return str(tokenseek_fx.explain(model, **batch, options={"scorer": "random"}).barriers[0])


# -- losses -----------------------------------------------------------------------------------------------------------


@misuse("Losses", "no loss in the model", "a loss in the model, or a scorer that needs none")
def _(**options):
    forward(WithoutLoss(), **options).sum().backward()


@misuse("Losses", "no loss in the model, rows drawn and weighted", '`select="topk"`, or the loss in the model')
def _(**options):
    forward(WithoutLoss(), scorer="attention", select="sample", **options).sum().backward()


@misuse("Losses", "no loss in the model, logits dropped", "the loss in the model")
def _(**options):
    forward(WithoutLoss(), scorer="attention", logits="drop", **options).sum().backward()


@misuse("Losses", "a loss per sequence, tokens drawn by their loss", '`scorer="gradient"`')
def _(**options):
    class Classifier(Model):
        def loss(self, logits, labels):
            return F.cross_entropy(logits.mean(1), labels[:, 0])

    train(Classifier(), **options)


@misuse("Losses", "a loss over some of the tokens", "`ignore_index` in the labels of the others")
def _(**options):
    class Part(Model):
        def loss(self, logits, labels):
            return F.cross_entropy(logits[:, ::2].flatten(0, 1), labels[:, ::2].flatten())

    train(Part(), scorer="random", **options)


@misuse("Losses", "a loss over labelled tokens, indexed by a mask", "`ignore_index` in the labels")
def _(**options):
    class Masked(Model):
        def loss(self, logits, labels):
            return F.cross_entropy(logits[labels > 0], labels[labels > 0])

    train(Masked(), **options)


@misuse("Losses", "rows given by `selecting`, and a loss that is not compiled", "the loss in a function of its own")
def _(**options):
    class Looped(Model):
        def forward(self, ids, labels):
            x = self.embed(ids)
            for _ in range(2):
                x = self.hidden(x)
                torch._dynamo.graph_break()
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()), x

    with tokenseek_fx.selecting(torch.tensor([[1, 3]] * B)):
        train(Looped(), **options)


@misuse("Losses", "a weight for each token in the call of the loss", '`reduction="none"`, then multiply and reduce')
def _(**options):
    class Weighted(Model):
        def loss(self, logits, labels):
            weight = (labels > 0).float().unsqueeze(-1)
            return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), weight)

    train(Weighted(), scorer="random", **options)


# -- backward ---------------------------------------------------------------------------------------------------------


@misuse("Backward", "backward twice", "`retain_graph=True`, or another forward")
def _(**options):
    loss, _ = forward(Model())
    loss.backward()
    loss.backward()


@misuse(
    "Backward", "a term computed from the logits, added to the model's loss", "the term in the model, or no loss there"
)
def _(**options):
    loss, logits = forward(Model())
    (loss + logits.square().mean()).backward()


@misuse("Backward", "backward of a forward under `no_grad`", "the forward outside `no_grad`")
def _(**options):
    with torch.no_grad():
        loss, _ = forward(Model())
    loss.backward()


@misuse("Backward", "a gradient of the gradient (`create_graph=True`)", "plain PyTorch for this term")
def _(**options):
    model = Model()
    loss, _ = forward(model, inner="aot_eager")
    (grad,) = torch.autograd.grad(loss, model.head.bias, create_graph=True)
    grad.sum().backward()


# -- compilers --------------------------------------------------------------------------------------------------------


@misuse("Compilers", "compiled twice, `model.compile()` then `torch.compile(model)`", "one of them")
def _(**options):
    model = Model()
    model.compile(backend="tokenseek", options={"inner": "eager", "keep_tokens": 2})
    forward(model, keep_tokens=3)


@misuse("Compilers", "`torch.jit.trace` of a compiled model", "trace the model that is not compiled")
def _(**options):
    torch.jit.trace(compiled(Model()), (ids(), ids()))


@misuse("Compilers", "`torch.jit.script` of a compiled model", "script the model that is not compiled")
def _(**options):
    torch.jit.script(compiled(Model()))


@misuse("Compilers", "`torch.fx` or `make_fx` of a compiled model", "trace the model that is not compiled")
def _(**options):
    make_fx(compiled(Model()))(ids(), ids())


# -- no message -------------------------------------------------------------------------------------------------------

SILENT = "Cases without a message"


@misuse(SILENT, "`eval`, `no_grad`, or no parameter that requires grad", "the model's own forward runs")
def _(**options):
    assert not selections(lambda: forward(Model().requires_grad_(False)))
    with torch.no_grad():
        assert not selections(lambda: forward(Model().eval()))


@misuse(SILENT, "a batch of padding only, or without labels", "loss and gradient are 0, not NaN")
def _(**options):
    model = zoo.build("llama")
    batch = {**zoo.batch(model, B, T), "attention_mask": torch.zeros(B, T, dtype=torch.int64)}
    loss = compiled(model)(**{**batch, "labels": torch.full((B, T), zoo.IGNORED)}).loss
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


@misuse(SILENT, "`keep_tokens` above the length", "all tokens are kept: plain training")
def _(**options):
    assert selections(lambda: forward(Model(), keep_tokens=99))[0].indices.shape == (B, T)


@misuse(SILENT, "a compiled submodule in a compiled model", "the options of the whole model apply")
def _(**options):
    model = Model()
    model.block.compile(backend="tokenseek", options={"keep_tokens": 2})
    assert selections(lambda: forward(model, keep_tokens=3))[0].indices.shape == (B, 3)


@misuse(SILENT, "`torch.export` of a compiled model", "the model's own forward is exported")
def _(**options):
    exported = torch.export.export(compiled(Model()), (ids(), ids()))
    assert not selections(lambda: exported.module()(ids(), ids()))


@misuse(
    SILENT,
    "a function around a compiled model compiled by another backend",
    "**trains on all tokens**: PyTorch uses the function's backend for all of it; compile the function with tokenseek",
)
def _(**options):
    model = Model()
    model.compile(backend="tokenseek", options={"inner": "eager"})
    step = torch.compile(lambda: model(ids(), ids()), backend="eager")
    assert not selections(step)


@misuse(
    SILENT,
    "a graph break in a loop, or one that Dynamo can't resume from (`retain_grad`), of a forward that calls no other "
    "function of the user's",
    "**trains on all tokens**: Dynamo runs the whole forward in Python and never calls the backend; "
    "`torch.compile(..., fullgraph=True)` shows the cause",
)
def _(**options):
    class Looped(Model):
        def forward(self, ids: Tensor, labels: Tensor) -> Any:
            x = self.embed(ids)
            for _ in range(2):
                x = x + x.softmax(1)
                torch._dynamo.graph_break()
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()), x

    class Retaining(Looped):
        def forward(self, ids: Tensor, labels: Tensor) -> Any:
            x = self.embed(ids)
            x.retain_grad()
            return self.head(self.block(x)).sum(), x

    for model in (Looped(), Retaining()):
        assert not selections(lambda model=model: compiled(model)(ids(), ids())[0])


@misuse(
    SILENT,
    'Dynamo switched off (`TORCHDYNAMO_DISABLE=1`, `torch.compiler.set_stance("force_eager")`)',
    "**trains on all tokens**: every compiled function runs as it is",
)
def _(**options):
    with torch.compiler.set_stance("force_eager"):
        assert not selections(lambda: forward(Model()))


@misuse(SILENT, "sequences of one token", "plain training: that token is kept")
def _(**options):
    assert not selections(lambda: compiled(Model())(ids()[:, :1], ids()[:, :1]))


@misuse(
    SILENT,
    "a scripted or traced (`torch.jit`) model compiled",
    "**trains on all tokens**: Dynamo skips it; compile the model itself",
)
def _(**options):
    traced = torch.jit.trace(Model(), (ids(), ids()), check_trace=False)
    assert not selections(lambda: forward(traced))


@misuse(
    SILENT,
    "a `torch.func` transform around a compiled model",
    "**trains on all tokens**: Dynamo skips it; compute the gradient by `backward` or `torch.autograd.grad`",
)
def _(**options):
    model = compiled(Model())
    weights = dict(model.named_parameters())
    call = lambda weights: torch.func.functional_call(model, weights, (ids(), ids()))[0]  # noqa: E731
    assert not selections(lambda: torch.func.grad(call)(weights))


@misuse(
    SILENT,
    "a module of `torch.nn` compiled in place",
    "**trains on all tokens**: Dynamo skips it; use `torch.compile(module)`, or wrap it in a module of your own",
)
def _(**options):
    model = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    model.compile(backend="tokenseek", options={"inner": "eager"})
    assert not selections(lambda: model(torch.randn(B, T, WIDTH)))


# -- trainers ---------------------------------------------------------------------------------------------------------


def begin(model: nn.Module, options: dict[str, Any], gpus: int = 0, **settings: Any) -> None:
    """Call the callback as a Trainer does when training begins, in a process with ``gpus`` GPUs."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments("unused", use_cpu=True, report_to=[], **settings)
    arguments._n_gpu = gpus
    callback = tokenseek_fx.integrations.TokenSeekCallback(**options)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)


@misuse("Trainers", "`model.compile(...)` together with `TokenSeekCallback`", "only the callback, with the options")
def callback_on_a_compiled_model(**options):
    model = nn.Linear(2, 2)
    model.compile(backend="eager")
    begin(model, options)


@misuse("Trainers", "`TrainingArguments(torch_compile=True)` together with `TokenSeekCallback`", "only the callback")
def callback_beside_torch_compile(**options):
    with mock.patch.dict("os.environ"):  # where transformers writes the settings of accelerate
        begin(nn.Linear(2, 2), options, torch_compile=True, torch_compile_backend="eager")


@misuse(
    "Trainers",
    "`TokenSeekCallback` in one process with several GPUs",
    "one process for each GPU, or one GPU: `CUDA_VISIBLE_DEVICES=0`",
)
def callback_under_data_parallel(**options):
    begin(nn.Linear(2, 2), options, gpus=2)


@misuse(
    "Trainers",
    "SFT of a mixture of experts, whose auxiliary loss TRL adds outside the model",
    "`router_aux_loss_coef=0.0`",
)
def trl_with_an_auxiliary_loss(**options):
    from trl.trainer.utils import add_fused_lm_head

    model = zoo.build("llama")
    add_fused_lm_head(model)
    model.config.output_router_logits = True
    begin(model, options)


# -- the page ---------------------------------------------------------------------------------------------------------

TABLE = "| mistake | error or warning | message | remedy |\n|---|---|---|---|"
SILENT_TABLE = """\
If PyTorch never calls the backend, the backend can't warn. To check, run one training step inside
`tokenseek_fx.record()`: the recording is empty if no tokens were selected.

| case | what happens, and the remedy |
|---|---|"""
HEAD = """\
# Errors

Common mistakes and their messages. This page is generated from [`tests/misuse.py`](../tests/misuse.py) by
[`tests/test_errors.py`](../tests/test_errors.py), which makes each mistake and compares class and message.

- `ConfigError`: an option or a scorer is invalid. It is always raised.
- `TokenSeekWarning`: the graph can't be rewritten exactly, or an option can't be followed. The model is compiled
  without token selection, unless the warning says otherwise. If `strict` is beside it, `strict=True` raises
  `GraphNotSupported` with the same fact instead.
- An error that the backend raises during compilation is the `inner_exception` of Dynamo's `BackendCompilerFailed`. All
  error classes of this package derive from `tokenseek_fx.TokenSeekError`.
- Other classes come from PyTorch, transformers or Python. The page shows the first paragraph of their messages.

`FILE:LINE` stands for a place in your code.
"""


def page(row: Callable[[Misuse], str] | None = None) -> str:
    """The text of ``docs/errors.md``. ``row``: returns the line of a case in its table."""
    sections = dict.fromkeys(case.section for case in CASES)
    return HEAD + "".join(_section(section, row or row_of) for section in sections)


def _section(section: str, row: Callable[[Misuse], str]) -> str:
    rows = "\n".join(row(case) for case in CASES if case.section == section)
    return f"\n## {section}\n\n{SILENT_TABLE if section == SILENT else TABLE}\n{rows}\n"


def row_of(case: Misuse) -> str:
    """The line of a case in its table, from its outcome."""
    found = outcome(case)
    if not found.kind:
        return f"| {case.what} | {case.remedy} |"
    fence = "``" if "`" in found.text else "`"
    strict = ", `strict`" if strictly(case) else ""
    return f"| {case.what} | `{found.kind}`{strict} | {fence}{found.text}{fence} | {case.remedy} |"


def strictly(case: Misuse) -> Outcome | None:
    """The error that ``strict=True`` raises instead of a warning, or None."""
    if outcome(case).kind != TokenSeekWarning.__name__:
        return None
    found = outcome(case, strict=True)
    return found if found.kind == GraphNotSupported.__name__ else None


if __name__ == "__main__":
    print(page())
