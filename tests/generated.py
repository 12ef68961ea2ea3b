"""The sections of the pages that are generated from code, between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

``EXPECTTEST_ACCEPT=1 pytest tests/test_docs.py -k generated`` writes them anew.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from tokenseek_fx import Config
from tokenseek_fx.passes.pipeline import training

DOCS = Path(__file__).parents[1] / "docs"

#: Words of a description in the table of options that link to another page.
LINKS = {
    "scorer": ("name", "scorers.md#scorers"),
    "select": ("chosen by their scores", "scorers.md#scorers"),
    "kv_grad": ("gradient through keys and values", "definition.md#keys-and-values-of-all-tokens"),
    "recompute": ("What backward recomputes", "memory.md#recompute"),
    "kv": ("keys and values of all tokens", "memory.md#keys-and-values"),
    "chunk_bytes": ("in chunks", "memory.md#chunk_bytes"),
    "memory_budget": ("Limit on the bytes", "memory.md#memory_budget"),
}


@dataclass(frozen=True)
class Section:
    """A part of a page: ``text`` generates it."""

    page: str
    name: str
    text: Callable[[], str]

    @property
    def path(self) -> Path:
        return DOCS / self.page

    def shown(self) -> str:
        """The section as it is on the page."""
        return self._split()[1]

    def write(self) -> None:
        before, _, after = self._split()
        self.path.write_text(f"{before}{self.text()}{after}")

    def _split(self) -> tuple[str, str, str]:
        begin, end = f"<!-- {self.name}:begin -->\n", f"<!-- {self.name}:end -->\n"
        before, rest = self.path.read_text().split(begin)
        shown, after = rest.split(end)
        return before + begin, shown, end + after


def options_table() -> str:
    """Each field of ``Config`` with its default and the first paragraph of its entry in the docstring."""
    entries = descriptions(Config)
    rows = [(field.name, _literal(field.default), _linked(field.name, entries[field.name])) for field in fields(Config)]
    lines = ["| option | default | description |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | `{default}` | {text} |" for name, default, text in rows), ""])


def descriptions(of: type) -> dict[str, str]:
    """The first paragraph of each entry under ``Args:`` in a docstring, as Markdown."""
    arguments = re.search(r"^Args:\n((?: .*\n|\n)*)", inspect.getdoc(of) or "", re.MULTILINE)
    assert arguments is not None
    entries = re.split(r"^(\w+): ", textwrap.dedent(arguments[1]), flags=re.MULTILINE)[1:]
    return {name: _markdown(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _markdown(entry: str) -> str:
    paragraph = " ".join(entry.split("\n\n")[0].split())
    return re.sub(r'``(.+?)``|("[\w.]+")', lambda found: f"`{found[1] or found[2]}`", paragraph)


def _linked(name: str, text: str) -> str:
    words, target = LINKS.get(name, ("", ""))
    assert words in text, f"{name}: {words!r} is not in its description"
    return text.replace(words, f"[{words}]({target})", 1) if words else text


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def pipeline_list() -> str:
    """The passes in order, as a list: name and first line of the docstring."""
    return "".join(f"{_item(line)}\n" for line in str(training(Config().plan())).splitlines())


def _item(line: str) -> str:
    number, _, rest = line.partition(" ")
    name, _, text = rest.partition(": ")
    return textwrap.fill(f"{number} **{name}**: {_markdown(text)}", 118, subsequent_indent=" " * (len(number) + 1))


SECTIONS = (Section("backend.md", "options", options_table), Section("how-it-works.md", "pipeline", pipeline_list))
