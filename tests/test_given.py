"""Rows given from outside: the reference's gradient for the same rows, in whole graphs and in fragments of models."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
import zoo
from compare import by_reference, error, grads_of, loss_of
from test_backend import Model, NoAttention, Split, compile_eager, data
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx import GraphNotSupported, SelectionError, TokenSeekWarning, selecting
from tokenseek_fx.given import Given
from tokenseek_fx.passes.lower.split import Segments

B, T = 2, 11


def rows(k: int, batch: int = B, tokens: int = T, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, tokens, generator=draw).argsort(-1)[:, :k].sort(-1).values


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TokenSeekWarning)
        yield


def train(step, model: nn.Module, batch, indices: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """The gradients of one step under ``selecting``."""
    model.zero_grad()
    with selecting(indices, weights):
        loss_of(step(**batch)).backward()
    return grads_of(model)


@pytest.fixture
def graphs(monkeypatch) -> list[str]:
    """A name for every compiled graph, in however many segments."""
    found: list[str] = []

    def count(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (found.append(name), plain(*args))[1])

    count(Segments, "compiled")
    count(importlib.import_module("tokenseek_fx.scoring"), "inner_compiler")
    return found


# -- whole graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scorer": "loss", "select": None}, {"kv_grad": "all"}, {"keep_ratio": 1.0}])
@pytest.mark.parametrize("first", ["own", "given"])
def test_whole_graphs_match_the_reference(options, first):
    model, batch = Model(), data()
    step = compile_eager(model, strict=True, **options)
    if first == "own":
        step(**batch).backward()
    indices = rows(4)
    blocks = "blocks" if "kv_grad" in options else None
    expected = by_reference(model, batch, indices, length=T, open_blocks=blocks)
    assert error(train(step, model, batch, indices), expected.grads) < 1e-9


def test_floats_that_are_dynamic():
    """With ``dynamic=True`` Dynamo's graph reads the floats of a model (epsilons, scales) from tensors."""
    model = zoo.build("llama", "sdpa").double()
    options = {"strict": True, "inner": "aot_eager"}
    step = torch.compile(model, backend="tokenseek", dynamic=True, options=options)
    for length in (T, T + 6):
        batch, indices = zoo.batch(model, B, length), rows(5, tokens=length)
        expected = by_reference(model, batch, indices, length=length)
        assert error(train(step, model, batch, indices), expected.grads) < 1e-6


def test_the_value_is_the_loss_of_the_rows_unless_the_full_one_is_asked_for():
    model, batch, indices = Model(), data(), rows(4)
    with selecting(indices):
        kept = compile_eager(model, scorer="loss")(**batch)
        torch._dynamo.reset()
        full = compile_eager(model, report_loss="full")(**batch)
    assert abs(kept - by_reference(model, batch, indices, length=T).loss) < 1e-9
    assert abs(full - model(**batch)) < 1e-9


def test_weights_are_those_of_the_reference():
    model, batch, indices = Model(), data(), rows(4)
    weights = torch.rand(B, 4, generator=torch.Generator().manual_seed(2)).double() + 0.5
    expected = by_reference(model, batch, indices, T, weights)
    assert error(train(compile_eager(model), model, batch, indices, weights), expected.grads) < 1e-9


@pytest.mark.parametrize("first", ["own", "given"])
def test_entering_and_leaving_never_uses_a_stale_graph(first, graphs):
    """Each call decides: own rows, given rows, other given rows, own rows; each graph is compiled once."""
    model, batch = Model(), data()
    step = compile_eager(model, scorer="first", keep_ratio=None, keep_tokens=4)
    if first == "given":
        train(step, model, batch, rows(4))
    own = by_reference(model, batch, torch.arange(4).expand(B, -1), length=T).grads
    for seed in range(3):
        model.zero_grad()
        step(**batch).backward()
        assert error(grads_of(model), own) < 1e-9
        indices = rows(4, seed=seed)
        assert error(train(step, model, batch, indices), by_reference(model, batch, indices, T).grads) < 1e-9
    assert len(graphs) == 2


def test_another_number_of_rows_compiles_twice_at_most(graphs):
    model, batch = Model(), data()
    step = compile_eager(model)
    for k in (4, 4, 7, 2, 9, 4, 1, 11, 1):
        indices = rows(k)
        assert error(train(step, model, batch, indices), by_reference(model, batch, indices, T).grads) < 1e-9
    # static for the first number; then dynamic; and one row, which is never a dynamic size
    assert len(graphs) == 3


def test_lengths_that_change(graphs):
    model = Model()
    model.position = nn.Parameter(torch.randn(1, 1, 12, dtype=torch.float64))
    step = compile_eager(model, strict=True)
    draw = torch.Generator().manual_seed(3)
    for batch, length, k in [(2, 11, 4), (2, 7, 3), (3, 10, 4), (4, 5, 2), (2, 9, 2), (3, 6, 1), (5, 8, 3)]:
        inputs = {name: torch.randint(29, (batch, length), generator=draw) for name in ("ids", "labels")}
        indices = rows(k, batch, length)
        expected = by_reference(model, inputs, indices, length)
        assert error(train(step, model, inputs, indices), expected.grads) < 1e-9
    assert len(graphs) == 4  # static; dynamic length; dynamic batch too; and one row


def test_evaluation_is_untouched():
    model = Model().eval()
    with torch.no_grad(), selecting(rows(4)):
        assert compile_eager(model)(**data()) == model(**data())


@pytest.mark.slow
def test_by_inductor():
    model, batch, indices = Model(), data(), rows(4)
    expected = by_reference(model, batch, indices)
    step = torch.compile(model, backend="tokenseek", options={"inner": "inductor", "strict": True})
    assert error(train(step, model, batch, indices), expected.grads) < 1e-6


def test_a_real_model():
    model = zoo.build("llama")
    batch, indices = zoo.batch(model, 3, 13, padding="right"), rows(5, 3, 13)
    expected = by_reference(model, batch, indices)
    step = torch.compile(model, backend="tokenseek", options={"inner": "aot_eager", "strict": True})
    assert error(train(step, model, batch, indices), expected.grads) < 1e-6


def test_a_recording_holds_what_was_given():
    indices, weights = rows(4), torch.ones(B, 4)
    with tokenseek_fx.record() as rec, selecting(indices, weights):
        compile_eager(Model())(**data())
    (selection,) = rec
    assert torch.equal(selection.indices, indices) and torch.equal(selection.weights, weights)
    assert torch.equal(selection.scores, torch.zeros(B, T).scatter(1, indices, 1.0))


def test_the_innermost_rows_apply():
    model, batch, indices = Model(), data(), rows(4)
    step = compile_eager(model)
    with tokenseek_fx.record() as rec, selecting(rows(3, seed=1)):
        with selecting(indices):
            step(**batch)
        step(**batch)
    assert [selection.indices.shape[1] for selection in rec] == [4, 3]


# -- modules compiled separately --------------------------------------------------------------------------------------


def kept_labels(labels: Tensor, indices: Tensor, shift: int) -> Tensor:
    """Only the labels of the given rows, for a loss that is not compiled."""
    kept = torch.zeros_like(labels, dtype=torch.bool).scatter(1, indices, True)
    return labels.where(torch.nn.functional.pad(kept, (shift, 0))[:, : labels.shape[1]], -100)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


@pytest.mark.parametrize("frozen_embedding", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_compiled_separately(name, frozen_embedding, graphs):
    model = zoo.build(name)
    model.get_input_embeddings().requires_grad_(not frozen_embedding)
    batch, indices = zoo.batch(model, 3, 13, padding="right"), rows(5, 3, 13)
    expected = by_reference(model, batch, indices)
    for block in blocks_of(model):
        block.compile(backend="tokenseek", options={"inner": "eager", "strict": True})
    batch["labels"] = kept_labels(batch["labels"], indices, 1)
    for _ in range(2):
        assert error(train(model, model, batch, indices), expected.grads) < 1e-6
    assert len(graphs) <= 1 + frozen_embedding, (
        "one graph for all blocks, and for the first where its input carries no gradient"
    )


def test_blocks_at_lengths_that_change(graphs):
    model = zoo.build("llama")
    for block in blocks_of(model):
        block.compile(backend="tokenseek", options={"inner": "eager"})
    for length, k in [(13, 5), (19, 4), (11, 7), (17, 2)]:
        batch, indices = zoo.batch(model, 3, length), rows(k, 3, length)
        expected = by_reference(zoo.build("llama"), batch, indices)
        batch["labels"] = kept_labels(batch["labels"], indices, 1)
        assert error(train(model, model, batch, indices), expected.grads) < 1e-6
    assert len(graphs) == 2


def test_seek_sees_through_blocks_that_are_compiled():
    plain, model, batch = zoo.build("llama"), zoo.build("llama"), zoo.batch(zoo.build("llama"), 3, 13)
    for block in blocks_of(model):
        block.compile(backend="tokenseek", options={"inner": "eager"})
    options = {"inner": "eager", "scorer": "tokenseek"}
    first, second = (tokenseek_fx.seek(m, options=options, **batch) for m in (plain, model))
    assert torch.equal(first.scores, second.scores)


@pytest.mark.parametrize("given_before", [False, True])
def test_blocks_without_given_rows_are_not_rewritten_and_say_so(given_before):
    model, plain, batch = zoo.build("llama"), zoo.build("llama"), zoo.batch(zoo.build("llama"), 3, 13)
    for block in blocks_of(model):
        block.compile(backend="tokenseek", options={"inner": "eager"})
    if given_before:
        kept = kept_labels(batch["labels"], rows(4, 3, 13), 1)
        train(model, model, {**batch, "labels": kept}, rows(4, 3, 13))
        model.zero_grad()
    with pytest.warns(TokenSeekWarning, match="fragment of a model.*selecting.*seek"):
        model(**batch).loss.backward()
    plain(**batch).loss.backward()
    assert error(grads_of(model), grads_of(plain)) < 1e-12


def test_the_warning_of_a_split_model_names_place_and_remedy():
    with pytest.warns(
        TokenSeekWarning, match=r"split the model at .*test_backend.py:\d+ .*fullgraph=True.*selecting\(indices\)"
    ):
        compile_eager(Split())(**data())


# -- models that Dynamo splits ----------------------------------------------------------------------------------------


class Breaks(Model):
    """Dynamo splits it at the named places."""

    def __init__(self, *places: str, head=None) -> None:
        super().__init__(head)
        self.places, self.norm = places, nn.LayerNorm(12).double()

    def at(self, place: str) -> None:
        if place in self.places:
            torch._dynamo.graph_break()

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        x = self.embed(ids)
        self.at("embedding")
        x = x + self.position
        self.at("position")
        x = self.blocks[0](x)
        self.at("block")
        x = self.norm(self.blocks[1](x))
        self.at("norm")
        logits = self.lm_head(x)
        self.at("head")
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


PLACES = ["embedding", "position", "block", "norm", "head"]


@pytest.mark.parametrize("places", [[place] for place in PLACES] + [PLACES], ids="+".join)
def test_split_models(places):
    model, batch = Breaks(*places), data()
    step = compile_eager(model)
    for indices in (rows(4), rows(4, seed=1), rows(6)):
        expected = by_reference(model, batch, indices, length=T)
        assert error(train(step, model, batch, indices), expected.grads) < 1e-9


def test_split_models_with_weights():
    model, batch, indices = Breaks("block"), data(), rows(4)
    weights = torch.tensor([[1.0, 2, 3, 4], [0.5, 1, 2, 0.1]]).double()
    expected = by_reference(model, batch, indices, T, weights)
    assert error(train(compile_eager(model), model, batch, indices, weights), expected.grads) < 1e-9


def test_a_split_model_at_lengths_that_change():
    model = Breaks("embedding", "block", "head")
    model.position = nn.Parameter(torch.randn(1, 1, 12, dtype=torch.float64))
    step, draw = compile_eager(model), torch.Generator().manual_seed(3)
    for batch, length, k in [(2, 11, 4), (2, 7, 3), (5, 10, 4), (7, 9, 2), (2, 8, 8)]:
        inputs = {name: torch.randint(29, (batch, length), generator=draw) for name in ("ids", "labels")}
        indices = rows(k, batch, length)
        expected = by_reference(model, inputs, indices, length)
        assert error(train(step, model, inputs, indices), expected.grads) < 1e-9


class Mixes(Breaks):
    """Mixes tokens before its first attention."""

    def __init__(self) -> None:
        super().__init__("embedding", "mixed")

    def forward(self, ids: Tensor, labels: Tensor):
        x = self.embed(ids)
        x = x + x.cumsum(1)
        self.at("mixed")
        return self.loss(self.blocks[0](x), labels)


class EagerBetween(Breaks):
    """Plain Python computes on the values that pass from one fragment to the next."""

    def forward(self, ids: Tensor, labels: Tensor):
        x = self.outside(self.blocks[0](self.embed(ids)))
        return torch.nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1), labels.flatten())

    @torch._dynamo.disable
    def outside(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Mixes, "before the first attention of the model mixes tokens.*Compile it together with the first attention"),
        (EagerBetween, "has a loss, but no attention, and no input from a fragment that has one"),
    ],
)
def test_fragments_that_would_be_wrong_are_refused(build, message):
    with pytest.raises(GraphNotSupported, match=message), selecting(rows(4)):
        compile_eager(build())(**data())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 29).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Pair(nn.Module):
    """A separate head after a body that is not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Model(lambda self, x, labels: x), Head()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids))


def test_a_compiled_head_after_plain_python_is_refused():
    model = Pair()
    model.head.compile(backend="tokenseek", options={"inner": "eager"})
    with (
        pytest.raises(GraphNotSupported, match="has an input with gradient, but no attention"),
        selecting(rows(4)),
    ):
        model(data()["ids"])


# -- seek -------------------------------------------------------------------------------------------------------------


def of_training(step, batch) -> tokenseek_fx.Selection:
    with tokenseek_fx.record() as rec:
        step(**batch)
    return rec[0]


@pytest.mark.parametrize("compiled", [False, "in place", True])
@pytest.mark.parametrize(
    "options", [{"scorer": "loss"}, {"scorer": "tokenseek"}, {"scorer": "random", "seed": 5}, {"keep_ratio": 1.0}]
)
def test_seek_chooses_what_training_would(options, compiled):
    model, batch, options = Model(), data(), {"inner": "eager", "keep_ratio": 0.4, **options}
    torch.manual_seed(0)
    expected = of_training(torch.compile(model, backend="tokenseek", options=options), batch)
    torch._dynamo.reset()
    if compiled == "in place":
        model.compile(backend="tokenseek", options={"inner": "eager"})
    torch.manual_seed(0)
    found = tokenseek_fx.seek(torch.compile(model) if compiled is True else model, options=options, **batch)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-12, msg=name)
    assert not grads_of(model)


def test_seek_then_train_on_it():
    model, batch = zoo.build("llama"), zoo.batch(zoo.build("llama"), 3, 13, padding="right")
    found = tokenseek_fx.seek(model, **batch, options={"inner": "aot_eager", "keep_ratio": 0.4})
    expected = by_reference(model, batch, found.indices, weights=found.weights)
    model.compile(backend="tokenseek", options={"inner": "aot_eager"})
    assert error(train(model, model, batch, found.indices, found.weights), expected.grads) < 1e-6


def test_seek_compiles_once(graphs):
    model, options = Model(), {"inner": "eager", "scorer": "tokenseek"}
    for seed in range(3):
        tokenseek_fx.seek(model, options=options, **data(seed=seed))
    assert len(graphs) == 1


def test_seek_sees_what_changed_in_the_model():
    model = Model(lambda self, x, labels: self.loss(x * (1 + self.training * x), labels))

    def scores() -> Tensor:
        return tokenseek_fx.seek(model, options={"inner": "eager"}, **data()).scores

    first = scores()
    model.eval()
    assert not torch.equal(first, scores())
    model.train()
    assert torch.equal(first, scores())
    with torch.no_grad():
        model.embed.weight.mul_(2)
    assert not torch.equal(first, scores())


def test_seek_writes_to_no_buffer():
    class Counts(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, ids, labels=None):
            self.steps += 1
            return super().forward(ids, labels)

    model = Counts()
    tokenseek_fx.seek(model, options={"inner": "eager"}, **data())
    assert model.steps == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Model().requires_grad_(False), "Nothing requires grad"),
        (Split, "Dynamo split the model at .*test_backend.py:"),
        (NoAttention, "No attention was found"),
    ],
)
def test_seek_refuses_what_it_can_not_score(build, message):
    batch = {"x": torch.randn(3, 4)} if build is NoAttention else data()
    for _ in range(2):
        with pytest.raises(GraphNotSupported, match=message):
            tokenseek_fx.seek(build(), options={"inner": "eager"}, **batch)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "weights"),
    [
        ([[0, 1]], None),
        (torch.tensor([0, 1]), None),
        (torch.tensor([[0, 1]], dtype=torch.int32), None),
        (torch.tensor([[1, 0]]), None),
        (torch.tensor([[1, 1]]), None),
        (torch.tensor([[-1, 0]]), None),
        (torch.empty(2, 0, dtype=torch.int64), None),
        (torch.tensor([[0, 1]]), torch.ones(1, 3)),
        (torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.int64)),
        (torch.tensor([[0, 1]]), torch.ones(1, 2, requires_grad=True)),
    ],
)
def test_malformed_rows_are_refused_at_once(indices, weights):
    with pytest.raises(SelectionError, match=r"^selecting: (expected|weights can't)"), selecting(indices, weights):
        pass


@pytest.mark.parametrize("compiled_before", [False, True])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (rows(4, 3), "indices are for 3 sequences, but the batch has 2"),
        (torch.tensor([[0, 11]] * 2), "index 11 is out of range: a sequence has 11 tokens"),
    ],
)
def test_rows_that_do_not_fit_the_batch_are_refused(indices, message, compiled_before):
    step = compile_eager(Model())
    if compiled_before:
        with selecting(rows(indices.shape[1])):
            step(**data())
    with pytest.raises(SelectionError, match=message), selecting(indices):
        step(**data())


def test_rows_on_another_device_are_refused():
    with pytest.raises(SelectionError, match="indices are on meta, but the model is on cpu"):
        Given(rows(4).to("meta"), None, last=9).check_fits(B, T, torch.device("cpu"))


def test_unused_rows_are_reported():
    with pytest.warns(TokenSeekWarning, match="no graph compiled for training ran inside"), selecting(rows(4)):
        Model()(**data())


def test_unused_weights_are_reported():
    step = compile_eager(Model(lambda self, x, labels: self.lm_head(x)))
    with pytest.warns(TokenSeekWarning, match="the weights had no effect"), selecting(rows(4), torch.ones(B, 4)):
        step(**data())
