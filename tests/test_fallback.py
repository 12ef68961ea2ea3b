"""What can't be rewritten falls back to plain training, and says so: faults, and ways to train on all tokens."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compare import by_reference, error, grads_of
from test_backend import Model, T, data
from torch import Tensor, fx, nn

from tokenseek_fx import Config, GraphNotSupported, TokenSeekWarning, compilation, selecting
from tokenseek_fx.compilation import Compiled, compile_graph
from tokenseek_fx.passes import Program, training
from tokenseek_fx.passes.lower.split import Segments

CONFIG = Config(inner="eager", keep_ratio=0.4)
PASSES = training(CONFIG.plan()).passes
PLACES = [*(step.name for step in PASSES), "compile"]
ROWS = torch.tensor([[1, 4], [0, 7]])
REPORT = "This is a bug in tokenseek-fx: please report it, with this message and the model."


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


# -- faults -----------------------------------------------------------------------------------------------------------


@functools.cache
def graph() -> tuple[fx.GraphModule, list]:
    """Dynamo's graph of a model of one block, and its inputs."""
    found = []
    torch.compile(Model(layers=1), backend=lambda gm, inputs: (found.append((gm, inputs)), gm)[1])(**data())
    return found[0]


@functools.cache
def before() -> dict[str, Program]:
    """The program before every pass of the pipeline, and before it is compiled, by the name of the pass."""
    gm, inputs = graph()
    programs = [Program(gm, tuple(inputs))]
    training(CONFIG.plan()).run(programs[0], after=lambda step, program: programs.append(program))
    return dict(zip(PLACES, programs, strict=True))


def fault(monkeypatch, name: str) -> None:
    """Let a pass fail, or the compilation of its result. Passes before it don't run again."""

    def broken(*args, **kwargs):
        raise KeyError("injected")

    program = before()[name]
    monkeypatch.setattr(compilation, "Program", lambda *args: program)
    if name == "compile":
        monkeypatch.setattr(Segments, "compiled", broken)
    else:
        monkeypatch.setattr(type(next(step for step in PASSES if step.name == name)), "run", broken)


@pytest.mark.injects_faults
@pytest.mark.parametrize("name", PLACES)
def test_a_fault_falls_back_and_names_its_pass(name, monkeypatch):
    fault(monkeypatch, name)
    gm, inputs = graph()
    text = rf"internal error, KeyError: 'injected' \(pass '{name}'\)\. {re.escape(REPORT)} Compiled without token"
    with pytest.warns(TokenSeekWarning, match=text):
        compiled = compile_graph(gm, inputs, CONFIG)
    assert torch.equal(compiled(*inputs)[0], gm(*inputs)[0])
    with pytest.raises(GraphNotSupported, match=rf"\(pass '{name}'\)"):
        compile_graph(gm, inputs, replace(CONFIG, strict=True))


@pytest.mark.injects_faults
@pytest.mark.filterwarnings("ignore:.*no rows were selected")
@pytest.mark.parametrize("name", ["canonicalize", "token axes"])
def test_a_fault_under_given_rows_is_an_error(name, monkeypatch):
    fault(monkeypatch, name)
    compiled = under_rows(replace(CONFIG, strict=False))
    with selecting(ROWS), pytest.raises(GraphNotSupported, match=rf"pass '{name}'.*{re.escape(REPORT)}"):
        compiled(*graph()[1])


@pytest.mark.injects_faults
def test_a_fault_falls_back_where_given_rows_came_first(monkeypatch):
    gm, inputs = graph()
    compiled = under_rows(CONFIG)
    fault(monkeypatch, "activity")
    with pytest.warns(TokenSeekWarning, match="pass 'activity'"):
        assert torch.equal(compiled(*inputs)[0], gm(*inputs)[0])


def under_rows(config: Config) -> Compiled:
    """The graph compiled under given rows; its own graph is compiled when it is first called without them."""
    with warnings.catch_warnings(), selecting(ROWS):
        warnings.simplefilter("ignore")
        return compile_graph(*graph(), config)


# -- losses outside of the graphs -------------------------------------------------------------------------------------


class Looped(Model):
    """Dynamo leaves its forward to Python: a graph break in a loop. ``inside``: the loss is computed in it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        if self.inside:
            return F.cross_entropy(self.lm_head(x).flatten(0, 1), labels.flatten())
        return self.loss(x, labels)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_loss_outside_of_the_graphs_is_refused_under_given_rows(batch):
    indices, inputs = ROWS[:1].repeat(batch, 1), data(batch)
    expected = by_reference(Looped(True), inputs, indices, length=T)
    message = r"rows that are not given.*Looped as plain Python.*test_fallback.py:\d+.*function or module of its own"
    with selecting(indices), pytest.raises(GraphNotSupported, match=message):
        compiled(Looped(True))(**inputs).backward()
    kept = inputs["labels"].where(torch.zeros(batch, T).scatter(1, indices, 1.0) > 0, -100)
    for remedy, labels in ((Looped(False), inputs["labels"]), (Looped(True), kept)):
        with selecting(indices):
            compiled(remedy)(inputs["ids"], labels).backward()
        assert error(grads_of(remedy), expected.grads) < 1e-9


def compiled(model: nn.Module, **options) -> Callable:
    torch._dynamo.reset()
    return torch.compile(model, backend="tokenseek", options={"inner": "eager", **options})


# -- other ways to train on all tokens --------------------------------------------------------------------------------


class LastQuery(Model):
    """Only the last token attends."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.blocks[0].qkv(x).chunk(3, -1)
        seen = self.attend(q[:, -1:], k, v)
        return self.loss(x + seen, labels)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class LastQueryByHand(LastQuery):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("build", [LastQuery, LastQueryByHand])
def test_attention_of_the_last_query_alone_is_told(build):
    with pytest.warns(TokenSeekWarning, match=r"Every attention has a single query\..*test_fallback.py:\d+"):
        compiled(build())(**data())
    with pytest.raises(Exception, match="single query") as caught:
        compiled(build(), strict=True)(**data())
    assert isinstance(caught.value.inner_exception, GraphNotSupported)
