"""A training run as plain data: written during training, read to make the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

FILE = "run.json"
_VERSION = 1

_Record = TypeVar("_Record", "Step", "Example")


@dataclass(frozen=True)
class Step:
    """One training step; ``None``: unknown.

    ``seconds``: its duration. ``kept``: the kept fraction of the tokens, 0 to 1; ``labelled``: that of the labelled
    tokens. ``peak``: peak memory in bytes. ``overlap``: the mean Jaccard index, 0 to 1, of the kept tokens with those
    of the previous visit of the same sequences.
    """

    step: int
    loss: float | None = None
    seconds: float | None = None
    kept: float | None = None
    labelled: float | None = None
    peak: int | None = None
    overlap: float | None = None


@dataclass(frozen=True)
class Example:
    """One sequence at one step: T tokens as text, and lists [T] of their values (``None`` in a list: unknown).

    ``kept``: positions of the kept tokens. ``scores``, ``attention``, ``gradient``, ``loss``, ``labelled``: as in
    ``tokenseek_fx.Selection``.

    Raises:
        ValueError: a list has another length than ``tokens``, or a position of ``kept`` is out of range.
    """

    step: int
    name: str
    tokens: Sequence[str]
    kept: Sequence[int]
    scores: Sequence[float | None] | None = None
    attention: Sequence[float | None] | None = None
    gradient: Sequence[float | None] | None = None
    loss: Sequence[float | None] | None = None
    labelled: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        for name in ("scores", "attention", "gradient", "loss", "labelled"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"Example {self.name!r}: expected {len(self.tokens)} values in `{name}`, one for each token; "
                    f"got {len(values)}."
                )
        outside = [i for i in self.kept if not 0 <= i < len(self.tokens)]
        if outside:
            raise ValueError(
                f"Example {self.name!r} keeps position {outside[0]}, but has {len(self.tokens)} tokens. "
                "Positions count from 0."
            )


@dataclass
class Run:
    """All that a report shows of a run.

    ``settings``: name -> text. ``steps``: its steps; ``plain``: the steps of a run on all tokens, for comparison.
    ``memory``: way ("tokenseek", "all tokens") -> part ("parameters", "gradients", "optimizer", "activations",
    "logits", "keys/values") -> bytes. ``positions``: a histogram of the kept tokens over relative positions, first to
    last; it sums to 1. ``graphs``: listings of the rewritten graph (``Explanation.graphs``), each a title and lines.

    >>> run = Run("a run", steps=[Step(1, loss=2.5)])
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     run.save(directory)
    ...     Run.load(directory) == run
    True
    """

    title: str
    settings: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    plain: list[Step] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    positions: list[float] = field(default_factory=list)
    graphs: list[str] = field(default_factory=list)

    def save(self, directory: str | Path) -> None:
        """Write ``directory/run.json``, creating the directory if needed. The file is replaced atomically."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{FILE}.part"
        part.write_text(json.dumps(self.plain_data(), allow_nan=False), encoding="utf-8")
        part.replace(folder / FILE)

    @classmethod
    def load(cls, directory: str | Path) -> Run:
        """Read ``directory/run.json``.

        Raises:
            FileNotFoundError: the file doesn't exist.
            ValueError: the file is not JSON, holds no run, or was written by an incompatible version of this package.
        """
        path = Path(directory) / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}. Write it again with Run.save.") from error
        if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
            raise ValueError(f"{path} is not a run of format version {_VERSION}. Write it again with Run.save.")
        return cls._of(path, data)

    @classmethod
    def _of(cls, path: Path, data: Mapping[str, Any]) -> Run:
        steps = {name: _records(path, Step, data.get(name, ())) for name in ("steps", "plain")}
        examples = _records(path, Example, data.get("examples", ()))
        return _made(path, cls, {**data, **steps, "examples": examples})

    def plain_data(self) -> dict[str, Any]:
        """The run as JSON types; numbers that are not finite become ``None``."""
        return _finite({"version": _VERSION, **asdict(self)})


def _records(path: Path, kind: type[_Record], rows: Sequence[Mapping[str, Any]]) -> list[_Record]:
    return [_made(path, kind, row) for row in rows]


def _made(path: Path, kind: type[Any], data: Mapping[str, Any]) -> Any:
    try:
        return kind(**data)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(kind))
        raise ValueError(
            f"{path}: expected a {kind.__name__} with fields from {known}; got {', '.join(data)}."
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
