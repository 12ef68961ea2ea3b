"""Losses over shifted tokens, written by hand, at other batch sizes and lengths than those of the first batch.

Every form of the loss is that of the reference at every call, whatever the scorer, how sizes become dynamic, and how
many tokens have a label.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import by_reference, error, grads_of
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tokenseek_fx
from tokenseek_fx.ops.head import head_loss
from tokenseek_fx.passes import Program, training
from tokenseek_fx.passes.graph.nodes import hint, operands_of
from tokenseek_fx.passes.graph.op_sets import LABEL_LOSSES
from tokenseek_fx.passes.streams.scoring_tail import cut
from tokenseek_fx.scorers import SCORERS

V, D, H = 37, 16, 2
#: (batch, length): no size is that of another dim of the model.
SIZES = ((5, 13), (4, 11), (7, 19), (5, 10), (4, 22), (7, 15))
#: The share of tokens with a label: some, none, few, all.
DENSITIES = (0.7, 0.0, 0.1, 1.0)
#: A loss of (model, hidden states [B, T, D], labels [B, T]).
Form = Callable[[Any, Tensor, Tensor], Tensor]


def flat(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), **options)


def second(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The classes are the second dim."""
    return F.cross_entropy(logits.transpose(1, 2), labels, **options)


def rolled(m: Any, x: Tensor, y: Tensor) -> Tensor:
    y = y.roll(-1, 1)
    y[:, -1] = -100
    return flat(m.head(x), y)


def masked_mean(m: Any, x: Tensor, y: Tensor) -> Tensor:
    losses, shown = second(m.head(x)[:, :-1], y[:, 1:], reduction="none"), (y[:, 1:] >= 0).double()
    return (losses * shown).sum() / shown.sum().clamp(min=1)


SHIFTED: dict[str, Form] = {
    "reshape": lambda m, x, y: flat(m.head(x)[:, :-1], y[:, 1:]),
    "flatten": lambda m, x, y: F.cross_entropy(m.head(x)[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "contiguous": lambda m, x, y: flat(m.head(x)[..., :-1, :].contiguous(), y[..., 1:].contiguous()),
    "classes second": lambda m, x, y: second(m.head(x)[:, :-1], y[:, 1:]),
    "cut behind the transpose": lambda m, x, y: F.cross_entropy(m.head(x).transpose(1, 2)[..., :-1], y[:, 1:]),
    "narrow": lambda m, x, y: flat(m.head(x).narrow(1, 0, x.shape[1] - 1), y.narrow(1, 1, x.shape[1] - 1)),
    "by two tokens": lambda m, x, y: flat(m.head(x)[:, :-2], y[:, 2:]),
    "several tokens": lambda m, x, y: flat(m.head(x)[:, :-1], y[:, 1:]) + 0.3 * flat(m.next(x)[:, :-2], y[:, 2:]),
    "backwards": lambda m, x, y: flat(m.head(x)[:, 1:], y[:, :-1]),
    "last tokens": lambda m, x, y: flat(m.head(x)[:, -5:-1], y[:, -4:]),
    "cut twice": lambda m, x, y: flat(m.head(x)[:, 1:][:, :-1], y[:, 2:]),
    "time first": lambda m, x, y: flat(m.head(x.transpose(0, 1))[:-1], y.t()[1:]),
    "nll": lambda m, x, y: F.nll_loss(m.head(x)[:, :-1].log_softmax(-1).flatten(0, 1), y[:, 1:].flatten()),
    "nll, classes second": lambda m, x, y: F.nll_loss(m.head(x).log_softmax(-1)[:, :-1].transpose(1, 2), y[:, 1:]),
    "soft cap": lambda m, x, y: flat(5 * torch.tanh(m.head(x)[:, :-1] / 5), y[:, 1:]),
    "fewer classes": lambda m, x, y: F.cross_entropy(
        m.head(x)[:, :-1, : V - 2].flatten(0, 1), y[:, 1:].flatten().clamp(max=V - 3)
    ),
    "smoothing and weights": lambda m, x, y: flat(
        m.head(x)[:, :-1], y[:, 1:], label_smoothing=0.1, weight=torch.linspace(0.1, 2, V).double()
    ),
    "sum by count": lambda m, x, y: (
        flat(m.head(x)[:, :-1], y[:, 1:], reduction="sum") / (y[:, 1:] >= 0).sum().clamp(min=1)
    ),
    "another ignored label": lambda m, x, y: flat(m.head(x)[:, :-1], y[:, 1:].clamp(min=0), ignore_index=0),
    "by token": masked_mean,
    "before the head": lambda m, x, y: flat(m.head(x[:, :-1]), y[:, 1:]),
    "before norm and head": lambda m, x, y: second(m.next(F.layer_norm(x, (D,))[:, 2:]), y[:, 2:]),
}
WHOLE: dict[str, Form] = {
    "padded labels": lambda m, x, y: flat(m.head(x), F.pad(y, (0, 1), value=-100)[:, 1:]),
    "rolled labels": rolled,
    "all tokens": lambda m, x, y: second(m.head(x), y),
    "regression to what is frozen": lambda m, x, y: F.mse_loss(x, m.embed(y.clamp(min=0)).detach()),
    "sum of differences": lambda m, x, y: F.l1_loss(x, torch.ones_like(x), reduction="sum") / 100,
}
FORMS = SHIFTED | WHOLE


class Model(nn.Module):
    """A block and the sum of some losses."""

    def __init__(self, *forms: str, sliced: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Embedding(V, D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.head, self.next = nn.Linear(D, V, bias=False), nn.Linear(D, V)
        self.forms, self.sliced = forms, sliced
        self.double()

    def losses(self, ids: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        labels = ids if labels is None else labels
        if self.sliced:
            ids, labels = ids[:, :-1], labels[:, 1:]
        x = self.embed(ids)
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return [FORMS[form](self, x, labels) for form in self.forms]

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.stack(self.losses(ids, labels)).sum()


@dataclass(frozen=True)
class Case:
    """A model and how it is compiled, and the batches that it is trained on.

    ``dynamic``: the argument of ``torch.compile``; "mark": the sizes of every batch are marked. ``densities``: the
    share of labels, for one batch after the other; ``None``: ids are labels.
    """

    forms: tuple[str, ...]
    options: dict[str, Any]
    dynamic: bool | str | None = None
    sizes: Sequence[tuple[int, int]] = SIZES[:4]
    densities: tuple[float | None, ...] = DENSITIES
    sliced: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, (*self.options.values(), self.dynamic, "sliced" if self.sliced else self.forms[0])))


def batch_of(batch: int, length: int, density: float | None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(batch * 1000 + length)
    ids, labels = (torch.randint(V, (batch, length), generator=draw) for _ in range(2))
    if density is None:
        return {"ids": ids}
    return {"ids": ids, "labels": labels.masked_fill(torch.rand(batch, length, generator=draw) >= density, -100)}


def assert_exact(case: Case) -> int:
    """Loss and gradients are those of the reference at every call. Returns the number of graphs."""
    torch._dynamo.reset()
    counters.clear()
    model = Model(*case.forms, sliced=case.sliced)
    options = {"inner": "eager", "keep_ratio": 0.4, "strict": True, "report_loss": "kept", **case.options}
    step = torch.compile(model, backend="tokenseek", dynamic=case.dynamic is True or None, options=options)
    for i, (size, length) in enumerate(case.sizes):
        batch = batch_of(size, length, case.densities[i % len(case.densities)])
        if case.dynamic == "mark":
            for x in batch.values():
                torch._dynamo.mark_dynamic(x, (0, 1))
        model.zero_grad(set_to_none=True)
        with tokenseek_fx.record() as rec:
            loss = step(**batch)
        loss.backward()
        found, (chosen,) = grads_of(model), rec
        model.zero_grad(set_to_none=True)
        expected = by_reference(model, batch, chosen.indices, length - case.sliced, chosen.weights)
        torch.testing.assert_close(loss.detach(), expected.loss.detach(), rtol=1e-9, atol=1e-12)
        assert error(found, expected.grads) < 1e-9, (size, length)
    return counters["stats"]["unique_graphs"]


GROUPS = [tuple(FORMS)[i::4] for i in range(4)]
CASES = [
    *(Case(forms, {"scorer": "random", "select": "topk"}, True) for forms in GROUPS),
    Case(("reshape",), {"scorer": "loss"}, sizes=SIZES),
    Case(("classes second",), {"scorer": "tokenseek", "chunk_bytes": 10_000}, "mark", densities=(None,)),
    Case(("by two tokens",), {"scorer": "attention", "report_loss": "kept"}, "mark"),
    Case(("all tokens",), {"scorer": "gradient"}, True, sliced=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_size_has_the_gradient_of_the_reference(case):
    assert assert_exact(case) <= 3


def drawn(seed: int) -> Case:
    """A random case."""
    draw = random.Random(seed)
    forms = tuple(draw.sample(list(FORMS), draw.choice((1, 1, 2))))
    options = {
        "scorer": draw.choice(list(SCORERS)),
        "keep_ratio": draw.choice((0.2, 0.4, 0.8)),
        "select": "topk" if "by token" in forms else draw.choice((None, "topk", "sample")),
        "chunk_bytes": draw.choice((None, 2_000)),
    }
    densities = (None,) if draw.random() < 0.2 else tuple(draw.sample(DENSITIES, 3))
    sizes = draw.sample(SIZES, 3)
    return Case(forms, options, draw.choice((None, True, "mark")), sizes, densities)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_cases(seed):
    assert_exact(drawn(seed))


@pytest.mark.slow
def test_inductor():
    assert assert_exact(Case(("reshape", "nll", "by token"), {"scorer": "attention", "inner": "inductor"}, True)) == 1


def test_a_shifted_loss_is_the_same_loss_over_all_tokens():
    """All forms, captured once with symbolic sizes: the graph that is analysed has their values at any size."""
    found: list[Program] = []

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append(training(tokenseek_fx.Config().plan()).run(Program(gm, tuple(inputs)), until="unshift labels"))
        return found[-1].module

    torch._dynamo.reset()
    model = Model(*FORMS)
    losses = torch.compile(model.losses, backend=capture, dynamic=True)
    for (size, length), density in zip(SIZES, DENSITIES, strict=False):
        batch = batch_of(size, length, density or 0.5)
        torch.testing.assert_close(losses(**batch), model.losses(**batch), rtol=1e-12, atol=0)
    (program,) = found
    targets = [operands_of(node)[1].meta["val"] for node in program.graph.nodes if node.target in LABEL_LOSSES]
    assert {hint(x.numel()) for x in targets} == {65} and len(targets) == len(FORMS) - 1


def test_a_symbolic_length_has_no_chunk_of_one_token():
    """A size of 1 is a constant in PyTorch: the graph would serve one length."""
    env, source = ShapeEnv(), ConstantSource("tokens")
    length = env.create_symintnode(env.create_symbol(13, source), hint=13, source=source)
    sizes = cut(length, 13)
    assert sum(map(hint, sizes)) == 13 and min(map(hint, sizes)) > 1


def test_the_head_loss_needs_one_target_for_each_row():
    given = (torch.randn(6, D), torch.randn(V, D), None, torch.randint(V, (8,)))
    how = (-100, 0.0, 1.0, torch.float32, False)
    with pytest.raises(RuntimeError, match=r"expected hidden \[N, D\] and target \[N\], got \[6, 16\] and \[8\]"):
        head_loss(*given, *how)
    with pytest.raises(RuntimeError, match="expected hidden"):
        head_loss(*(x if x is None else x.to("meta") for x in given), *how)
