"""Golden graphs: one small model after every pass.

``EXPECTTEST_ACCEPT=1 pytest tests/test_golden.py`` regenerates them.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import expecttest
import pytest
from golden_model import graphs

GOLDEN = Path(__file__).parent / "golden"
PASSES = sorted(graphs())


@pytest.mark.parametrize("name", PASSES)
def test_graph_after(name):
    file, text = GOLDEN / f"{name.replace(' ', '-')}.txt", graphs()[name] + "\n"
    if expecttest.ACCEPT:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    expected = file.read_text() if file.exists() else ""
    changes = difflib.unified_diff(expected.splitlines(), text.splitlines(), file.name, "now", lineterm="")
    assert text == expected, "\n".join(changes)


def test_every_golden_graph_belongs_to_a_pass():
    assert {file.stem for file in GOLDEN.iterdir()} == {name.replace(" ", "-") for name in PASSES}
