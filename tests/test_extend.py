"""The files of examples/extend: they run, the page shows them unchanged, and their operations obey the law."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_op import Case, OneOp, build, draw
from operations import as_they_are, dim
from test_oracle import Moved, assert_moves_alone, claims
from test_rules import check_law, check_placement, placements, which_live

from tokenseek_fx.passes import FindPositionalAttention
from tokenseek_fx.passes.attention.positional import PositionalAttentions

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "extend"))
from attention_op import capped
from elementwise_op import gated
from mixing_op import running_mean

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples" / "extend").glob("*.py"))
#: One process for all files: their registrations stay in it, and it imports only once.
RUN = "import runpy, sys\nfor file in sys.argv[1:]: runpy.run_path(file, run_name='__main__')"


def test_the_files_run():
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, FILES)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert len(done.stdout.splitlines()) >= len(FILES)


def test_the_page_shows_the_files_unchanged():
    page = (ROOT / "docs" / "extend.md").read_text()
    shown = re.findall(r'^```py title="(\S+)"\n((?:.*\n)*?)^```$', page, re.MULTILINE)
    assert dict(shown) == {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
    assert len(shown) == len(FILES)


def capped_at(n, *operands):
    return *operands, 2.0


#: Their cases of the law test. Attention with a soft cap that isn't positional is a barrier along its queries.
CASES = [
    Case(gated._opoverload, "b t d, b t d", "b t d", as_they_are, {}, shares="b t d"),
    Case(running_mean._opoverload, "b t d", "b d", dim, {}),
    Case(capped._opoverload, "b h T d, b h T d, b h T d", "b h", capped_at, {}, shares="b"),
]


def built(case: Case) -> Iterator[tuple[OneOp, list[torch.Tensor]]]:
    """The case with every choice of operands that carry gradient."""
    torch.manual_seed(0)
    operands = draw(case, case.sizes())
    for live in which_live(case):
        taken = [x.detach().requires_grad_(flag) for x, flag in zip(operands, live, strict=True)]
        yield build(case, case.sizes(), taken), taken


@pytest.mark.parametrize("case", CASES, ids=str)
def test_selecting_rows_commutes_with_their_operations(case):
    for op, operands in built(case):
        for token, t, batch, b in placements(case, op):
            check_placement(case, op.named(t, b), operands, token, batch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_axes_that_their_rules_carry_move_independently(case):
    for op, operands in built(case):
        moved = Moved(op, operands, draw(case, case.sizes()))
        for claim in claims(op):
            assert_moves_alone(moved, *claim)


def test_the_attention_is_positional():
    for op, operands in built(CASES[-1]):
        op = op.named(op.names["T"][0], op.names["b"][0])
        op = replace(op, program=FindPositionalAttention().run(op.program))
        found = op.program[PositionalAttentions][op.node]
        assert found.softcap == 2.0 and found.mask.causal
        assert check_law(op, operands, "by position") == 0
