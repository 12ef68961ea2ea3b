"""Batches of changing sizes: few graphs, the same share of rows, the gradient of the reference at every size."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
import zoo
from compare import by_reference, error, grads_of, loss_of
from marks import slow
from test_backend import D, Model, V
from torch import Tensor, nn
from torch._dynamo.utils import counters

import tokenseek_fx
from tokenseek_fx import TokenSeekWarning
from tokenseek_fx.passes.attention.positional import FindPositionalAttention, PositionalAttentions
from tokenseek_fx.passes.graph.program import Program
from tokenseek_fx.passes.streams.select import kept_tokens

#: Sizes of other dims of the models: the reference could not recognise a token axis of such a size.
TAKEN = {D, 2 * D, 3 * D, V, 3, 4}
Sizes = list[tuple[int, int]]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def any_length() -> Model:
    model = Model()
    model.position = nn.Parameter(torch.randn(1, 1, D, dtype=torch.float64))
    return model


def batch_of(batch: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(batch * 1000 + length)
    ids, labels = (torch.randint(V, (batch, length), generator=draw) for _ in range(2))
    return {"ids": ids, "labels": labels.masked_fill(torch.rand(batch, length, generator=draw) < 0.3, -100)}


def pairs(count: int, longest: int = 70) -> Sizes:
    """Different (batch, length) in irregular order; a ratio of 0.3 keeps at least two rows."""
    every = [(b, t) for b in range(2, 9) for t in range(5, longest) if b != t and not {b, t} & TAKEN]
    return random.Random(0).sample(every, count)


def compile_(model: nn.Module, dynamic: bool | None = None, **options):
    defaults = {"inner": "eager", "keep_ratio": 0.3, "strict": True}
    return torch.compile(model, backend="tokenseek", dynamic=dynamic, options={**defaults, **options})


def assert_exact(step, model: nn.Module, batch: dict[str, Tensor], tol: float = 1e-9) -> Tensor:
    """Compare one step with the reference for its kept rows, and return them."""
    model.zero_grad()
    with tokenseek_fx.record() as rec:
        loss = loss_of(step(**batch))
    loss.backward()
    (selection,) = rec
    length = next(iter(batch.values())).shape[1]
    expected = by_reference(_without_grads(model), batch, selection.indices, length, selection.weights)
    assert error(grads_of(model), expected.grads) < tol
    return selection.indices


def _without_grads(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.zero_grad()
    return model


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("scorer", ["loss", slow("tokenseek")])
def test_100_sizes_compile_3_times_at_most_and_each_is_exact(dynamic, scorer):
    model = any_length()
    step = compile_(model, dynamic, scorer=scorer)
    for batch, length in pairs(100):
        indices = assert_exact(step, model, batch_of(batch, length))
        assert indices.shape == (batch, kept_tokens(length, 0.3))
    assert graphs() <= 3


def test_one_row_is_a_graph_of_its_own():
    """PyTorch has no dynamic size of 1."""
    model = any_length()
    step = compile_(model, dynamic=True)
    for batch, length in [(2, 11), (5, 2), (7, 2), (2, 10)]:
        assert assert_exact(step, model, batch_of(batch, length)).shape == (batch, kept_tokens(length, 0.3))
    assert graphs() == 2


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("llama", None),
        slow("gpt2", True),
    ],
)
def test_real_models_at_sizes_that_change(name, dynamic):
    """By Inductor: ``test_inductor_runs_chunks_of_any_length``."""
    model = zoo.build(name)
    step = compile_(model, dynamic, inner="eager" if dynamic else "aot_eager")
    for batch, length in [(3, 13), (3, 19), (7, 23), (2, 11), (5, 17), (3, 11)]:
        assert_exact(step, model, zoo.batch(model, batch, length, padding="right"), 1e-6)
    assert graphs() <= 3


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_attention_is_recognised_at_lengths_that_change(name, monkeypatch):
    """Keys before head repetition and positional masks are recognised, so no more is kept than at a fixed length."""
    programs, run = list[Program](), FindPositionalAttention.run
    monkeypatch.setattr(
        FindPositionalAttention, "run", lambda self, program: programs.append(run(self, program)) or programs[-1]
    )
    model = zoo.build(name)
    step = compile_(model)
    for length in (13, 19):
        loss_of(step(**zoo.batch(model, 3, length, padding="right")))
    fixed, changing = (
        [
            (x.key.meta["val"].shape[1], x.mask.causal, x.mask.window, len(x.mask.keys), x.mask.added)
            for x in program[PositionalAttentions].values()
        ]
        for program in programs
    )
    assert fixed == changing
    assert [heads for heads, *_ in fixed] == [zoo.KV_HEADS] * 2


def test_a_last_smaller_batch():
    """An epoch of batches of one size, the last of which is smaller: down to one sequence."""
    model = any_length()
    step = compile_(model)
    for batch in (5, 5, 2, 5, 1):
        assert assert_exact(step, model, batch_of(batch, 11)).shape == (batch, 4)
    assert graphs() == 3  # static; of any batch; and of one sequence, which is never a dynamic size


@pytest.mark.parametrize("dynamic", [None, True])
def test_sequences_of_one_token_are_trained_whole(dynamic):
    model, plain = any_length(), any_length()
    plain.load_state_dict(model.state_dict())
    step = compile_(model, dynamic)
    assert_exact(step, model, batch_of(2, 11))
    model.zero_grad()
    batch = {"ids": torch.tensor([[1], [2]]), "labels": torch.tensor([[3], [4]])}
    step(**batch).backward()
    plain(**batch).backward()
    assert error(grads_of(model), grads_of(plain)) < 1e-12
    assert_exact(step, model, batch_of(2, 10))


@pytest.mark.parametrize("dynamic", [None, slow(True)])
@pytest.mark.parametrize("options", [{}, {"scorer": "random", "select": "topk"}])
def test_sequences_shorter_than_the_number_of_rows_keep_all(dynamic, options):
    model = any_length()
    step = compile_(model, dynamic, keep_ratio=None, keep_tokens=8, **options)
    for batch, length in [(2, 17), (2, 11), (5, 7), (2, 6), (7, 8), (2, 5), (5, 13)]:
        assert assert_exact(step, model, batch_of(batch, length)).shape == (batch, min(8, length))
    assert graphs() <= 4  # static; of any length, of any batch; and with all rows kept


def test_beyond_dynamos_limit_training_is_plain_after_a_warning():
    """The last graph that Dynamo compiles warns.

    Later batches that fit no graph run eagerly on all tokens; the graphs stay in use.
    """
    model = any_length()
    step = compile_(model, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", TokenSeekWarning)
            assert_exact(step, model, batch_of(2, 11))
        with pytest.warns(TokenSeekWarning, match="compiled this forward 2 times, its recompile limit"):
            assert_exact(step, model, batch_of(2, 10))
        for length in (9, 8):
            plain, batch = _without_grads(model), batch_of(2, length)
            model.zero_grad()
            with tokenseek_fx.record() as rec:
                step(**batch).backward()
            plain(**batch).backward()
            assert error(grads_of(model), grads_of(plain)) < 1e-12 and not rec
        assert_exact(step, model, batch_of(2, 11))
    assert graphs() == 2


@pytest.mark.filterwarnings("ignore:tokenseek. Dynamo compiled this forward")
def test_the_limit_can_be_made_an_error():
    step = compile_(any_length(), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        step(**batch_of(2, 11))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            step(**batch_of(2, 10))
