"""The result of a command and how it is printed: text for people, one JSON object for programs, an exit code for both.

Exit codes: 0 success, 1 failure, 2 invalid request, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from ..passes.graph.errors import ConfigError, TokenSeekError

INTERRUPTED = 130
_LINES = 20  # shown of the message of an error from outside this package


class Failure(Exception):
    """The request can't be carried out. ``data``: extra fields of the JSON output, beside ``error``."""

    code = 1

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.data = data


class Usage(Failure):
    """The request is invalid."""

    code = 2


class Interrupted(Failure):
    """The user stopped the command."""

    code = INTERRUPTED


@dataclass(frozen=True)
class Answer:
    """``data``: the output of ``--json``. ``shown``: the output for people. ``code``: the exit code."""

    data: dict[str, Any]
    shown: Sequence[RenderableType] = ()
    code: int = 0


def progress_console() -> Console:
    """The console for progress and notes: stderr, never stdout."""
    return Console(stderr=True, highlight=False)


def answers(work: Callable[..., Answer]) -> Callable[..., None]:
    """Turn a function that returns an ``Answer`` into a command. What the function itself prints goes to stderr."""

    @functools.wraps(work)
    def command(**arguments: Any) -> None:
        as_json = arguments.get("as_json", False)
        try:
            with redirect_stdout(sys.stderr):
                answer = work(**arguments)
        except BaseException as error:
            raise typer.Exit(_tell_error(error, as_json)) from None
        _tell(answer, as_json)
        if answer.code:
            raise typer.Exit(answer.code)

    return command


def _tell(answer: Answer, as_json: bool) -> None:
    if as_json:
        _print_json(answer.data)
    else:
        console = Console(highlight=False)
        for each in answer.shown:
            text = isinstance(each, str)  # printed without markup: a shape in brackets would be read as a tag
            console.print(each, soft_wrap=text, markup=not text)


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(_finite(data), indent=1, default=str))


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _tell_error(error: BaseException, as_json: bool) -> int:
    """Print the error and return the exit code; for errors from outside this package (bugs) print the traceback too."""
    if isinstance(error, (SystemExit, typer.Exit)):
        raise error
    error = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
    message = "Interrupted." if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
    if not isinstance(error, (Failure, TokenSeekError, KeyboardInterrupt)):
        traceback.print_tb(error.__traceback__)
        message = "\n".join(f"{type(error).__name__}: {message}".splitlines()[:_LINES])
    if as_json:
        _print_json({"error": message} | getattr(error, "data", {}))
    Console(stderr=True, highlight=False).print(f"[red]tokenseek:[/] {escape(message)}", soft_wrap=True)
    return _code(error)


def _code(error: BaseException) -> int:
    if isinstance(error, Failure):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 2 if isinstance(error, ConfigError) else 1
