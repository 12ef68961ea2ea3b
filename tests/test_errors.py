"""``docs/errors.md`` has the outcomes of the cases in ``tests/misuse.py``.

``EXPECTTEST_ACCEPT=1 pytest tests/test_errors.py`` regenerates it.
"""

from __future__ import annotations

from pathlib import Path

import expecttest
import pytest
from marks import PYTORCH
from misuse import CASES, outcome, page, row_of, strictly

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"


def shown() -> dict[str, str]:
    """The lines of the tables by mistake."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def test_the_page_has_every_case_and_nothing_else():
    if expecttest.ACCEPT:
        PAGE.write_text(page())
    lines = shown()
    assert PAGE.read_text() == page(lambda case: lines.get(case.what, f"{case.what}: not on the page"))


#: Messages of PyTorch itself, which depend on its version: the page has those of 2.13.
OF_PYTORCH = {"model and batch on different devices"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_class_and_text_are_those_of_the_page(case):
    if case.what in OF_PYTORCH and PYTORCH != (2, 13):
        assert f"| `{outcome(case).kind}` |" in shown()[case.what]
    else:
        assert shown()[case.what] == row_of(case)
    assert outcome(case).kind != "AssertionError" and "internal error" not in outcome(case).text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_strict_raises_the_fact_of_the_warning(case):
    if raised := strictly(case):
        fact = raised.text.split(". ")[0]
        assert fact in outcome(case).text
