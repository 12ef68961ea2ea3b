"""The documentation is true: its Python runs, its output blocks and graphs match, its links resolve, and its generated
sections are up to date (``generated.py``).

- ```` ```python ````: executed, one namespace per file, in order. ```` ```py ```` is not, and ``NOT_RUN`` says why.
- ```` ```py title="FILE" ````: a whole file; `test_extend.py` compares it and runs the file.
- ```` ```sh title="run" ````: executed, lines `python FILE ...` and `tokenseek ...`, in an empty directory.
- other ```` ```sh ````: takes minutes, or installs; its commands exist and have the options that are given.
- ```` ```text title="output" ````: what the block before it printed.
- ```` ```text title="after NAME" ````: the golden graph after the pass NAME.

In both, ``...`` stands for anything that was left out.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import operator
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import expecttest
import pytest
import torch
import typer
from generated import SECTIONS
from golden_model import graphs
from marks import slow
from peft.tuners.lora import dora
from typer.testing import CliRunner

import tokenseek_fx
import tokenseek_fx.integrations
from tokenseek_fx.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
#: What a new user tries first.
FIRST = ("README.md", "docs/quickstart.md")
#: Pages with slow code.
LONG = ("docs/memory.md", "docs/setups.md", "docs/cli.md")
SUBJECTS = [page for page in PAGES if re.search(r"^```(python|sh title)", page.read_text(), re.MULTILINE)]

#: Passes whose golden graphs differ by a few lines from that of the pass before.
ALIKE = {"chunks", "kv copies"}
#: The pages with ```` ```py ````.
NOT_RUN = {"README.md": "the one line, before there is a model: the example below it runs the same line"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: ``info`` is the text after the opening fence."""

    info: str
    text: str
    line: int

    @property
    def title(self) -> str:
        found = re.search(r'title="([^"]*)"', self.info)
        return found[1] if found else ""


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```(.+)\n((?:.*\n)*?)^```$", text, re.MULTILINE):
        yield Block(found[1], found[2], text[: found.start()].count("\n") + 2)


def assert_shows(want: str, got: str) -> None:
    if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
        pytest.fail(f"the page shows\n{want}\nbut this comes out\n{got}")


def run(page: Path, block: Block, namespace: dict) -> str:
    """Execute a block; its errors point into the page."""
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, namespace)
    return out.getvalue()


def run_commands(block: Block) -> str:
    """Execute the commands of a block; return the output of the last."""
    printed = ""
    for program, *arguments in map(shlex.split, block.text.replace("\\\n", " ").splitlines()):
        if program == "tokenseek":
            printed = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
        else:
            command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return printed


def assert_can_be_given(program: str, *arguments: str) -> None:
    """Check that a command exists and has the options that it is given."""
    options = {each for each in arguments if each.startswith("--")}
    if program == "make":
        alone = {"PATH": os.environ["PATH"]}  # without the options that a surrounding `make test` passes on
        dry = ["make", "--dry-run", *arguments]
        planned = subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True, env=alone)
        command = shlex.split(planned.stdout.splitlines()[-1])
        program, *arguments = [word for word in command if not re.match(r"[A-Z_]+=", word)]
        assert_can_be_given(Path(program).name, *arguments)
    elif program == "tokenseek":
        command = typer.main.get_command(app).commands[arguments[0]]
        assert options <= {name for option in command.params for name in option.opts}
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        asked = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        assert {*",".join(asked).split(",")} <= {"", *project["optional-dependencies"]}
    elif arguments[0] == "-m":
        assert program == "python" and importlib.util.find_spec(arguments[1])
    elif program == "python":
        texts = [(ROOT / file).read_text() for file in (arguments[0], "benchmarks/suite.py")]
        assert all(any(f'"{each}"' in text for text in texts) for each in options)
    else:
        assert program in (".", "pytest")


@pytest.fixture(autouse=True)
def _fresh():
    """Pages change settings of Dynamo and PEFT, which must not affect others."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    as_it_is = mock.patch.object(dora, "dequantize_module_weight", dora.dequantize_module_weight)
    with as_it_is, torch._dynamo.config.patch(optimize_ddp=True):
        yield


@pytest.mark.parametrize("page", [slow(page) if name(page) in LONG else page for page in SUBJECTS], ids=name)
def test_code_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch, request):
    """Inductor's C++ is compiled for the pages that a new user tries first."""
    if name(page) not in FIRST:
        request.getfixturevalue("without_code")
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": "__main__"}, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(page):
            if block.info.startswith("python"):
                printed = run(page, block, namespace)
            elif block.title == "run":
                printed = run_commands(block)
            elif block.title == "output":
                assert_shows(block.text, printed)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_commands_that_are_not_run_exist(page):
    for block in blocks(page):
        if block.info == "sh":
            for line in block.text.replace("\\\n", " ").replace("&&", "\n").splitlines():
                assert_can_be_given(*shlex.split(line, comments=True))


@pytest.mark.parametrize(
    "wrong",
    ["make nothing", "make bench ARGS=--nothing", "tokenseek finetune --nothing", "pip install '.[nothing]'",
     "python -m nothing", "python examples/demo.py --nothing", "nothing at all"],
)  # fmt: skip
def test_a_missing_command_is_found(wrong):
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        assert_can_be_given(*shlex.split(wrong))


def test_python_that_is_not_run_is_run_elsewhere_on_its_page():
    found = {}
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        run = [block.text for block in blocks(page) if block.info.startswith("python")]
        for block in blocks(page):
            if block.info == "py":
                found[name(page)] = any(block.text.split("  #")[0].strip() in text for text in run)
    assert found == dict.fromkeys(NOT_RUN, True)


def test_the_lines_from_scratch_are_as_many_as_the_pages_say():
    page = ROOT / "docs" / "from-scratch.md"
    code = "".join(block.text for block in blocks(page) if block.info.startswith("python"))
    count = sum(bool(line.strip()) for line in code.splitlines())
    assert count <= 150
    for path in (page, ROOT / "docs" / "index.md"):
        assert re.findall(r"in (\d+) lines", path.read_text()) == [str(count)], name(path)


@pytest.mark.parametrize("page", [page for page in PAGES if 'title="after ' in page.read_text()], ids=name)
def test_graphs_are_the_golden_ones(page):
    shown = [block for block in blocks(page) if block.title.startswith("after ")]
    assert [block.title for block in shown] == [f"after {name}" for name in graphs() if name not in ALIKE]
    for block in shown:
        assert_shows(block.text, graphs()[block.title.removeprefix("after ")] + "\n")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Headings as GitHub links them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_generated_sections_are_up_to_date(section):
    if expecttest.ACCEPT:
        section.write()
    assert section.shown() == section.text()


def test_every_page_is_in_the_menu():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_every_public_name_is_on_the_page_of_the_api():
    text = (ROOT / "docs" / "api.md").read_text()
    names = re.findall(r"^::: tokenseek_fx\.(\S+)$", text, re.MULTILINE)
    assert text.count(":::") == len(names)
    shown = [operator.attrgetter(name)(tokenseek_fx) for name in names]
    for module in (tokenseek_fx, tokenseek_fx.integrations, tokenseek_fx.passes, tokenseek_fx.report):
        for public in module.__all__:
            value = getattr(module, public)
            listed = isinstance(value, ModuleType) or any(value is x for x in shown)
            assert listed, f"{module.__name__}.{public}"
    assert {"reference.ditching", "stats"} <= set(names)
