"""The tables of the pages are those of the committed runs, and their claims hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import estimate  # noqa: E402
import gpus  # noqa: E402
import lower_bound  # noqa: E402

BOUND, ESTIMATE, GPUS = (
    json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("lower_bound", "estimate", "gpus")
)


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("memory", lower_bound.markdown(BOUND["results"])),
        ("memory", estimate.markdown(ESTIMATE["results"])),
        ("memory", gpus.markdown(GPUS["results"])),
        ("memory", gpus.markdown_of_step(GPUS["step"])),
    ],
    ids=["lower bound", "estimate", "gpus", "step"],
)
def test_the_page_shows_the_committed_run(page, table):
    assert table in (ROOT / f"docs/{page}.md").read_text()


@pytest.mark.parametrize(
    ("page", "settings"), [("memory", BOUND["settings"]), ("memory", GPUS["settings"])], ids=["lower bound", "gpus"]
)
def test_the_page_says_what_was_set(page, settings):
    assert " ".join(settings.split()) in " ".join((ROOT / f"docs/{page}.md").read_text().split())


def test_no_more_than_15_percent_above_the_lower_bound_is_saved():
    assert len(BOUND["results"]) == len(lower_bound.ARCHITECTURES) * len(lower_bound.WAYS)
    assert not lower_bound.above(BOUND["results"])


def test_excess_over_the_lower_bound_is_detected():
    more = [{**result, "saved": 2 * result["lower_bound"]} for result in BOUND["results"]]
    assert len(lower_bound.above(more)) == len(more)


def test_estimates_are_within_10_percent_of_what_was_measured():
    off = {result["setting"]: result["estimated"] / result["measured"] - 1 for result in ESTIMATE["results"]}
    assert list(off) == [str(setting) for setting in estimate.SETTINGS]
    assert all(abs(error) <= estimate.ALLOWED for error in off.values()), off


def test_gpus_are_estimated_in_every_shape_way_and_length():
    found = {(r["shape"], r["method"], r["length"]) for r in GPUS["results"]}
    assert found == {(s, m, n) for s in gpus.SHAPES for m in gpus.METHODS for n in gpus.LENGTHS}
