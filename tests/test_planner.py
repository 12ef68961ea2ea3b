"""The planner: the candidate for a budget, and the message if none fits. Only the last test has real sizes."""

from __future__ import annotations

import pytest
from test_estimate import DROP, llama

from tokenseek_fx import Config, ConfigError, GraphNotSupported, TokenSeekWarning, estimate
from tokenseek_fx.planner import choose

RATIO = 0.2


def size(config: Config) -> int:
    """100 bytes in any case; chunks take 400, small ones 100; keys and values 500, half if they are recomputed.

    The rows of all tokens take 5000, a fifth of it if they are recomputed.
    """
    rows = 5000 * (config.keep_ratio if config.keep_tokens is None else config.keep_tokens / 100)
    chunks, context = 100 if config.chunk_bytes else 400, 250 if config.kv == "recompute" else 500
    return int(100 + chunks + context + rows / (5 if config.recompute == "rows" else 1))


def chosen(budget: int, **options) -> Config:
    return choose(Config(memory_budget=budget, **({"keep_ratio": RATIO} | options)), size, small=10)


@pytest.mark.parametrize(
    ("budget", "recompute", "chunk_bytes", "kv"),
    [
        (2000, "none", None, "keep"),
        (1999, "rows", None, "keep"),
        (1200, "rows", None, "keep"),
        (1199, "rows", 10, "keep"),
        (900, "rows", 10, "keep"),
        (899, "rows", 10, "recompute"),
        (650, "rows", 10, "recompute"),
    ],
)
def test_the_first_that_fits_is_taken(budget, recompute, chunk_bytes, kv):
    config = chosen(budget)
    assert (config.recompute, config.chunk_bytes, config.kv) == (recompute, chunk_bytes, kv)


def test_only_the_free_candidate_is_tried_if_it_fits():
    tried = []
    choose(Config(memory_budget=9000), lambda config: tried.append(config.recompute) or size(config), 10)
    assert tried == ["none"]


def test_options_of_the_user_stay():
    with pytest.warns(TokenSeekWarning, match="would fit"):
        config = chosen(800, recompute=500, chunk_bytes=20, kv="fp8")
    assert (config.recompute, config.chunk_bytes, config.kv) == (500, 20, "fp8")
    with pytest.warns(TokenSeekWarning, match="would fit"):
        assert chosen(800, kv_grad="all").kv == "keep"


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({}, "keep_ratio=0.05 would fit"), ({"keep_ratio": None, "keep_tokens": 20}, "keep_tokens=5 would")],
)
def test_if_nothing_fits_a_warning_says_what_would(options, remedy):
    with pytest.warns(
        TokenSeekWarning, match=f"memory_budget=510: forward and backward hold at least .* MiB. {remedy}"
    ):
        assert chosen(510, **options).kv == "recompute"
    with pytest.raises(GraphNotSupported, match=remedy):
        chosen(510, strict=True, **options)


def test_if_no_ratio_fits_a_warning_says_so():
    with pytest.raises(
        GraphNotSupported, match="A keep_ratio 16 times smaller does not fit either: use shorter sequences"
    ):
        chosen(451, strict=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory_budget": "8 apples"}, "memory_budget='8 apples': expected bytes, as an integer or as text"),
        ({"memory_budget": 0}, "memory_budget=0: expected bytes"),
        ({"chunk_bytes": -1}, "chunk_bytes=-1: expected bytes"),
        ({"memory_budget": 5, "inner": "eager"}, "memory_budget=5 has no effect: inner='eager'"),
    ],
)
def test_bad_budgets_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Config(**options)


@pytest.mark.slow
def test_a_budget_below_the_held_bytes_recomputes_rows():
    options = {**DROP, "keep_ratio": 0.5, "scorer": "random", "strict": True}

    def step(**more):
        return estimate(llama("meta", layers=2), 2, 32, options={**options, **more}, plain=False).step

    kept, recomputed = step(recompute="none"), step(recompute="rows")
    assert max(recomputed.forward, recomputed.backward) < max(kept.forward, kept.backward)
    assert step(memory_budget=max(kept.forward, kept.backward) - 1) == recomputed
