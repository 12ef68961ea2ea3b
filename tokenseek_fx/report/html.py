"""A run as one HTML file that contains template, style, program and data, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path

from .run import Run


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of ``run`` as one HTML file that opens from disk, and return its path.

    Missing directories are created; an existing file is overwritten.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_report(Run("a run"), directory + "/report.html").name
    'report.html'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(run), encoding="utf-8")
    return path


def page(run: Run) -> str:
    """The report as text. Its content security policy lets the browser run only the program with this hash."""
    text, program = _part("report.html"), _part("report.js")
    parts = {"HASH": _hash(program), "STYLE": _part("report.css"), "PROGRAM": program, "DATA": embedded(run)}
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def embedded(run: Run) -> str:
    """The run as JSON that is safe in HTML: ASCII only, without ``<``, ``>`` and ``&``."""
    text = json.dumps(run.plain_data(), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _hash(program: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()}"


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
