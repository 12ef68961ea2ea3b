"""The memory table in docs/setups.md is that of the committed run, and its claims hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402

RUN = json.loads((ROOT / "benchmarks/results/memory.json").read_text())
RESULTS = RUN["results"]


def test_the_page_shows_the_committed_run():
    page = (ROOT / "docs/setups.md").read_text()
    assert all(table in page for table in memory.tables(RESULTS))
    assert " ".join(RUN["settings"].split()) in " ".join(page.split())


def test_lora_with_tokenseek_uses_less_than_full_training_with_it_and_than_lora_alone_at_every_length():
    lengths = {result["length"] for result in RESULTS}
    assert lengths >= {256, 512, 1024, 2048, 4096}
    assert len(RESULTS) == len(lengths) * len(memory.METHODS) * len(memory.BACKENDS)
    assert not memory.broken_claims(RESULTS)


def test_a_broken_claim_is_detected():
    worse = [
        {**r, "peak": 100 * r["peak"]} if (r["method"], r["backend"]) == ("LoRA", "tokenseek") else r for r in RESULTS
    ]
    assert len(memory.broken_claims(worse)) == 2 * len({result["length"] for result in RESULTS})
