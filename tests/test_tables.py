"""The table of saved bytes in docs/memory.md is that of the committed run, and nothing in it is far above the floor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import floor  # noqa: E402

RUN = json.loads((ROOT / "benchmarks/results/floor.json").read_text())


def test_the_page_shows_the_committed_run():
    page = (ROOT / "docs/memory.md").read_text()
    assert floor.markdown(RUN["results"]) in page
    assert " ".join(RUN["settings"].split()) in " ".join(page.split())


def test_no_more_than_15_percent_above_the_floor_is_saved():
    assert len(RUN["results"]) == len(floor.ARCHITECTURES) * len(floor.WAYS)
    assert not floor.above(RUN["results"])


def test_what_is_above_is_seen():
    assert len(floor.above([{**result, "saved": 2 * result["floor"]} for result in RUN["results"]])) == len(
        RUN["results"]
    )
