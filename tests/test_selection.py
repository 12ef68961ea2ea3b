"""Which rows are kept, and with what weight: ``Select`` against the plain-Python selection of ``scores.py``."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import scores
import torch
from compare import executed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backend import Model, T, data
from torch import Tensor

from tokenseek_fx.passes.streams.select import ScoreInputs, Select, Selected

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True)
SHARES = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])


@st.composite
def cases(draw, ties: bool = True) -> dict[str, Tensor | None]:
    """Scores and noise, float64 [B, T], and what is known of the tokens; at least one and all labelled are attended."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    uniform = lambda: torch.rand(batch, tokens, generator=generator, dtype=torch.float64)  # noqa: E731
    score = uniform() * draw(st.sampled_from([1, 4, 40])) - 2
    if ties and draw(st.booleans()):
        score = (score * 2).round()
    attended = uniform() < draw(st.sampled_from([0.4, 0.9])) if draw(st.booleans()) else None
    if attended is not None:
        attended[:, draw(st.integers(0, tokens - 1))] = True
    labelled = uniform() < draw(st.sampled_from([0.0, 0.2, 0.7])) if draw(st.booleans()) else None
    if labelled is not None and attended is not None:
        labelled = labelled & attended
    return {"score": score, "noise": uniform(), "attended": attended, "labelled": labelled}


@st.composite
def pins(draw, tokens: int, kept: int) -> list[int]:
    return draw(st.lists(st.integers(0, tokens - 1), unique=True, max_size=kept))


def rules_of(case: dict, row: int, kept: int, pinned: list[int], **rules) -> scores.Rules:
    """The plain rules of one instance."""
    tokens = case["score"].shape[1]
    known = {name: case[name][row].tolist() for name in ("labelled", "attended", "noise") if case[name] is not None}
    return scores.Rules(kept, **known, pinned=[i in pinned for i in range(tokens)], **rules)


def select(case: dict, pinned: list[int], **options) -> Selected:
    batch, tokens = case["score"].shape
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    mask[:, pinned] = True
    inputs = ScoreInputs(
        batch,
        tokens,
        torch.device("cpu"),
        noise=case["noise"],
        labelled=case["labelled"],
        attended=case["attended"],
        pinned=mask if pinned else None,
    )
    return Select(lambda _: case["score"].clone(), **options)(inputs)


def padded(case: dict) -> Tensor:
    """The reported scores: -inf on padding."""
    return case["score"] if case["attended"] is None else case["score"].masked_fill(~case["attended"], -math.inf)


@EXAMPLES
@given(cases(), st.floats(0.01, 1), SHARES, st.booleans(), st.data())
def test_topk(case, ratio, share, keep_label, data):
    tokens = case["score"].shape[1]
    kept = scores.ceil_share(ratio, tokens)
    pinned = data.draw(pins(tokens, kept))
    found = select(case, pinned, keep_ratio=ratio, labelled_first=share, keep_label=keep_label)
    assert torch.equal(found.scores, padded(case)) and found.weights is None
    assert found.indices.dtype == torch.int64
    for row, (chosen, score) in enumerate(zip(found.indices.tolist(), case["score"].tolist(), strict=True)):
        rules = rules_of(case, row, kept, pinned, labelled_first=share, keep_label=keep_label)
        assert chosen == rules.choose(score)


@EXAMPLES
@given(
    cases(ties=False),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([1.5, 20.0, 1e12]),
    SHARES,
    st.booleans(),
    st.data(),
)
def test_sample(case, ratio, mix, clip, share, keep_label, data):
    tokens = case["score"].shape[1]
    kept = scores.ceil_share(ratio, tokens)
    pinned = data.draw(pins(tokens, kept))
    how = {"labelled_first": share, "keep_label": keep_label}
    found = select(case, pinned, keep_ratio=ratio, method="sample", mix=mix, weight_clip=clip, **how)
    assert torch.equal(found.scores, padded(case))
    for row in range(len(found.indices)):
        rules = rules_of(case, row, kept, pinned, **how)
        chosen, weights = scores.sample(case["score"][row].tolist(), case["noise"][row].tolist(), rules, mix, clip)
        assert found.indices[row].tolist() == chosen
        counted = torch.tensor([rules.has_label(i) and not rules.padding(i) for i in chosen])
        torch.testing.assert_close(
            found.weights[row][counted], torch.tensor(weights, dtype=torch.float64)[counted], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("kept", [1, 5, 12, 99])
def test_keep_tokens_is_the_number_itself(method, kept):
    case = {"score": torch.randn(2, 12).double(), "noise": torch.rand(2, 12).double(), "attended": None}
    found = select({**case, "labelled": None}, [], keep_ratio=None, keep_tokens=kept, method=method)
    assert found.indices.shape == (2, min(kept, 12))
    if kept >= 12:
        assert found.indices.tolist() == [list(range(12))] * 2
        assert found.weights is None or (found.weights == 1).all()


@pytest.mark.parametrize("noise", [0.0, 2.0**-24, 1 - 2.0**-24])
@pytest.mark.parametrize("mix", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("score", [0.0, -math.inf, 1e4, math.nan])
def test_a_sample_of_extreme_noise_and_scores_is_finite(noise, mix, score):
    case = {"score": torch.zeros(2, 9), "noise": torch.full((2, 9), 0.5), "attended": None, "labelled": None}
    case["score"][:, 3], case["noise"][0, :4], case["noise"][1, 4:] = score, noise, noise
    found = select(case, [0], keep_tokens=4, keep_ratio=None, method="sample", mix=mix, weight_clip=50.0)
    assert found.weights.isfinite().all() and (found.weights >= 1).all() and (found.weights <= 50).all()
    assert (found.indices.diff(dim=1) > 0).all() and (found.indices[:, 0] == 0).all()


def test_no_score_at_all_falls_back_to_uniform():
    """Every score -inf: the draw is over labelled tokens, top-k goes by noise."""
    labelled = torch.tensor([[False] * 5 + [True] * 4])
    case = {"score": torch.full((1, 9), -math.inf), "noise": torch.rand(1, 9), "attended": None, "labelled": labelled}
    first = case["noise"].argsort(descending=True)[:, :3].sort().values
    assert torch.equal(select(case, [], keep_tokens=3, keep_ratio=None, keep_label=False).indices, first)
    drawn = select(case, [], keep_tokens=3, keep_ratio=None, method="sample")
    assert labelled[0][drawn.indices[0]].all() and drawn.weights.isfinite().all()


# ---- by hand


def test_order_ties_padding_pins_and_shares_by_hand():
    keys = [5.0, 1.0, 4.0, 4.0, 9.0, 0.0]
    assert scores.Rules(3).choose(keys) == [0, 2, 4]
    assert scores.Rules(3, attended=[False, True, True, True, False, True]).choose(keys) == [1, 2, 3]
    assert scores.Rules(5, attended=[False, True, True, True, False, True]).choose(keys) == [0, 1, 2, 3, 5]
    assert scores.Rules(3, pinned=[False] * 5 + [True]).choose(keys) == [0, 4, 5]
    labelled = [False, True, False, False, False, True]
    assert scores.Rules(3, labelled, keep_label=False).choose(keys) == [0, 2, 4]
    assert scores.Rules(3, labelled).choose(keys) == [0, 1, 4]
    assert scores.Rules(3, labelled, labelled_first=0.5).choose(keys) == [1, 4, 5]


def test_threshold_by_hand():
    keys, labelled = [5.0, 1.0, 4.0, 3.0], [False, True, False, True]
    assert scores.threshold(0, keys, scores.Rules(2)) == 3.0
    assert scores.threshold(2, keys, scores.Rules(2)) == 3.0
    assert scores.threshold(3, keys, scores.Rules(2, labelled)) == 1.0  # the one reserved row: labelled tokens compete
    assert scores.threshold(3, keys, scores.Rules(3, labelled, keep_label=False)) == 1.0
    assert scores.threshold(3, keys, scores.Rules(1, [False, False, False, True])) == -math.inf


# ---- the estimator


ESTIMATORS = {
    "plain": {},
    "labelled first": {"labelled_first": 0.5},
    "all labelled first": {"labelled_first": 1.0},
    "pinned": {"pinned": [True] + [False] * 8},
    "any tokens": {"labelled": None},
    "padding": {"attended": [True] * 7 + [False] * 2},
    "label not kept": {"keep_label": False},
}


@pytest.mark.parametrize("case", ESTIMATORS)
def test_the_weighted_sum_is_unbiased(case):
    """The mean over draws of sum w_i f_i is sum f_i over labelled tokens, within 5 standard errors; not without w."""
    labelled = [True, False, True, True, False, False, True, False, False]
    rules = replace(scores.Rules(3, labelled), **ESTIMATORS[case])
    score = [2.0, 1.5, -1.0, 0.5, 0.0, 1.0, 0.2, 0.3, -0.5]
    f = [rules.has_label(i) * (1.0 + i) for i in range(9)]
    uniform = random.Random(0)
    draws = []
    for _ in range(4000):
        noise = [uniform.random() for _ in score]
        draws.append(scores.sample(score, noise, rules, mix=0.2))
    weighted = torch.tensor([sum(w * f[i] for i, w in zip(*draw, strict=True)) for draw in draws])
    full = sum(f[i] for i in range(9) if not rules.padding(i))
    error = 5 * weighted.std() / len(draws) ** 0.5
    assert abs(weighted.mean() - full) < error < 0.15 * full
    assert abs(torch.tensor([sum(f[i] for i in chosen) for chosen, _ in draws]).mean() - full) > 2 * error


def test_the_compiled_estimator_is_unbiased_too():
    generator = torch.Generator().manual_seed(0)
    draws, tokens = 20_000, 9
    labelled = torch.tensor([True, False, True, True, False, False, True, False, False]).expand(draws, tokens)
    case = {
        "score": torch.tensor([2.0, 1.5, -1.0, 0.5, 0.0, 1.0, 0.2, 0.3, -0.5]).double().expand(draws, tokens),
        "noise": torch.rand(draws, tokens, generator=generator),
        "attended": None,
        "labelled": labelled,
    }
    found = select(case, [], keep_tokens=3, keep_ratio=None, method="sample", mix=0.2, weight_clip=1e12)
    f = torch.arange(1.0, 10.0).double() * labelled
    sums = (found.weights * f.gather(1, found.indices)).sum(1)
    assert abs(sums.mean() - f[0].sum()) < 5 * sums.std() / draws**0.5


@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("score", [0.0, -math.inf])
def test_spare_rows_are_drawn_among_the_tokens_without_a_label(method, score):
    """Where fewer tokens have a label than are kept: every other token that is no padding is kept equally often."""
    draws, tokens = 4000, 12
    labelled, attended = (torch.zeros(tokens, dtype=torch.bool) for _ in range(2))
    labelled[[7, 8]], attended[:10] = True, True
    case = {
        "score": torch.where(labelled, 1.0, score).expand(draws, tokens),
        "noise": torch.rand(draws, tokens, generator=torch.Generator().manual_seed(0)),
        "attended": attended.expand(draws, tokens),
        "labelled": labelled.expand(draws, tokens),
    }
    found = select(case, [], keep_tokens=5, keep_ratio=None, method=method, mix=0.0, labelled_first=1.0)
    kept = torch.zeros(draws, tokens).scatter(1, found.indices, 1.0).mean(0)
    assert (kept[labelled] == 1).all() and (kept[~attended] == 0).all()
    torch.testing.assert_close(kept[:7], torch.full((7,), 3 / 8), atol=0.03, rtol=0)


@pytest.mark.parametrize("options", [{"scorer": "loss", "select": None}, {"scorer": "loss"}, {"scorer": "strided"}])
def test_spare_rows_of_a_model_follow_the_seed(options):
    model, batch = Model(layers=1), data(16)
    batch["labels"] = torch.full((16, T), -100).index_fill(1, torch.tensor([T - 1]), 1)
    first, same, other = (
        executed(model, batch, keep_tokens=3, keep_ratio=None, seed=seed, **options).indices for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert torch.equal(first, other) == (options["scorer"] == "strided")
    if options["scorer"] == "loss":
        assert (first[:, -1] == T - 1).all()
        assert first[:, :-1].unique().numel() > T / 2
