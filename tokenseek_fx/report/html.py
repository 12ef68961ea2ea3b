"""A run as one HTML file: template, style, program and data in it; nothing is fetched."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from .run import Run


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of ``run`` as one HTML file that works from disk, and return its path.

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
    """The report as text."""
    parts = {"STYLE": _part("report.css"), "DATA": embedded(run), "PROGRAM": _part("report.js")}
    head, *rest = _part("report.html").split("<!--")
    filled = (parts[name] + text for name, text in (piece.split("-->", 1) for piece in rest))
    return head + "".join(filled)


def embedded(run: Run) -> str:
    """The run as JSON that no text in it can break out of: only ASCII, and no character that HTML reads."""
    text = json.dumps(run.plain_data(), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
