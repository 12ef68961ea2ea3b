"""What can't be rewritten falls back to plain training, and says so: faults, and ways to train on all tokens."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import zoo
from compare import assert_matches, by_reference, error, grads_of
from test_backend import Model, T, V, data
from torch import Tensor, fx, nn

from tokenseek_fx import Config, GraphNotSupported, TokenSeekWarning, compilation, record, selecting
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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: copy.deepcopy(nn.Sequential(m))[0]])
def test_a_copy_of_a_model_compiled_in_place_selects_too(copied, trained):
    torch._dynamo.reset()
    model = Model(layers=1)
    model.compile(backend="tokenseek", options={"inner": "eager", "scorer": "last", "keep_tokens": 4})
    if trained:
        model(**data())
    copy_of, indices = copied(model), torch.arange(T - 4, T).repeat(2, 1)
    with record() as recording:
        copy_of(**data()).backward()
    assert torch.equal(recording[0].indices, indices)
    assert error(grads_of(copy_of), by_reference(Model(layers=1), data(), indices, length=T).grads) < 1e-9
    assert copied is copy.copy or not grads_of(model)


def test_copies_of_other_models_and_pickles_are_those_of_pytorch():
    model, other = Model(layers=1), Model(layers=1)
    model.compile(backend="tokenseek")
    other.compile(backend="eager")
    assert copy.deepcopy(other)._compiled_call_impl is None
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded._compiled_call_impl is None and vars(loaded).keys() == vars(Model(layers=1)).keys()


# -- reasons and their remedies ---------------------------------------------------------------------------------------


def halved(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad / 2)
    return x


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad / 2


def test_a_tensor_hook_is_told_and_its_remedy_is_exact():
    inputs = data()
    hooked, remedy = (Model(lambda self, x, y, half=half: self.loss(half(x), y)) for half in (halved, Halved.apply))
    with pytest.warns(TokenSeekWarning, match=r"register_hook.*torch.autograd.Function.*test_fallback.py:\d+"):
        compiled(hooked)(**inputs).backward()
    plain = Model(lambda self, x, y: self.loss(Halved.apply(x), y))
    plain(**inputs).backward()
    assert error(grads_of(hooked), grads_of(plain)) < 1e-12
    with record() as recording:
        compiled(remedy, strict=True)(**inputs).backward()
    expected = by_reference(remedy, inputs, recording[0].indices, T, recording[0].weights)
    assert error(grads_of(remedy), expected.grads) < 1e-9


def test_backward_hooks_of_a_module_are_told_by_the_line_that_calls_it():
    model = Model(layers=1)
    model.blocks[0].register_full_backward_hook(lambda *args: None)
    with pytest.warns(TokenSeekWarning, match=r"can't trace .*test_backend.py:\d+ .*Remove the backward hooks"):
        compiled(model)(**data())


def test_reading_the_data_of_a_value_is_exact():
    for head in (
        lambda self, x, y: self.loss(x + x.data.tanh(), y),
        lambda self, x, y: self.loss(x * x.detach().data.sigmoid(), y),
    ):
        assert_matches(Model(head, layers=1), data(), 1e-9)


def by_count(self, x, y):
    """A sum of losses, divided by a number that is read from a tensor."""
    sums = F.cross_entropy(self.lm_head(x).flatten(0, 1), y.flatten(), reduction="sum")
    return sums / (y >= 0).sum().item()


def checked(self, x, y):
    torch._check_tensor_all(y < V, lambda: "labels out of range")
    return self.loss(x, y)


@pytest.mark.parametrize("head", [by_count, checked])
def test_a_number_read_from_a_tensor_is_traced_by_fullgraph(head):
    model, inputs = Model(head, layers=1), data(3)
    with pytest.warns(TokenSeekWarning, match=r"test_fallback.py:\d+ .*Compile with fullgraph=True"):
        compiled(model)(**inputs)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="tokenseek", options={"inner": "eager", "scorer": "random"})
    with record() as recording:
        step(**inputs).backward()
    assert error(grads_of(model), by_reference(model, inputs, recording[0].indices, T).grads) < 1e-9


@pytest.mark.parametrize("fullgraph", [False, True])
def test_sizes_that_depend_on_data_are_told_alike(fullgraph):
    for head in (
        lambda self, x, y: F.cross_entropy(self.lm_head(x)[y >= 0], y[y >= 0]),
        lambda self, x, y: F.cross_entropy(
            self.lm_head(x.flatten(0, 1)[at := y.flatten().ge(0).nonzero()[:, 0]]), y.flatten()[at]
        ),
    ):
        torch._dynamo.reset()
        step = torch.compile(
            Model(head, layers=1), fullgraph=fullgraph, backend="tokenseek", options={"inner": "eager"}
        )
        with pytest.warns(TokenSeekWarning, match=r"Keep the sizes: .*ignore_index") as caught:
            step(**data())
        told = [str(warning.message) for warning in caught if warning.category is TokenSeekWarning]
        assert len(told) == 1 and "fullgraph" not in told[0] and "test_fallback.py:" in told[0]


def test_outputs_that_transformers_collects_by_hooks():
    """The hooks are added in the first forward that collects them, at which Dynamo splits the model."""
    model = zoo.build("llama")
    inputs = {**zoo.batch(model, 2, T), "output_hidden_states": True}
    with pytest.warns(TokenSeekWarning, match=r"plain Python.*can't trace .*output_capturing.*call the model once"):
        compiled(model)(**inputs)
    model = zoo.build("llama")
    with torch.no_grad():
        model(**inputs)
    with record() as recording:
        compiled(model, strict=True)(**inputs)
    assert len(recording) == 1


class Untraced(Model):
    """Its first part is no graph, so the first graph is that of the rest."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedded(ids)
        for block in self.blocks[:1]:
            x = block(x)
        return self.loss(x, labels)

    @torch._dynamo.disable
    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.position


def test_a_split_is_told_once():
    """By the first fragment that is compiled, also if that is not the first part of the model."""
    with pytest.warns(TokenSeekWarning, match="Dynamo split the model at") as caught:
        compiled(Untraced())(**data())
    assert sum(warning.category is TokenSeekWarning for warning in caught) == 1
