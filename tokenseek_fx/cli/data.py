"""Read training data row by row. Each row has its line number; each row that can't be used has the reason.

Files are read line by line here, so that line numbers are known; dataset names and saved directories by ``datasets``,
which is optional.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .answer import Failure, Usage

#: Columns that are found without ``--columns``, in this order.
KNOWN = (("messages",), ("prompt", "completion"), ("text",))
_SHOWN = 10  # bad lines that an error lists


@dataclass(frozen=True)
class Row:
    """A row as read. ``line``: the line where it begins, from 1 (for datasets and files without lines, its number)."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """A row that can't be used. ``text``: its content, as far as it can be shown."""

    line: int
    reason: str
    text: str = ""


class BadRow(ValueError):
    """A row can't be used; the message is the reason."""


def rows(source: str, split: str = "train", subset: str | None = None) -> Iterator[Row | Bad]:
    """The rows of a file (.jsonl, .json, .csv, .tsv, .parquet; any other is text) or of a dataset by name or directory.

    Raises:
        Failure: the file doesn't exist, the dataset can't be loaded, or the library that reads it is missing.
    """
    path = Path(source)
    if path.is_file():
        return READERS.get(path.suffix.lower(), _text)(path)
    if path.is_dir() or not _looks_like_a_file(path):
        return _dataset(source, split, subset)
    raise Failure(f"{source}: no such file.")


def _looks_like_a_file(path: Path) -> bool:
    return path.suffix.lower() in {*READERS, ".txt", ".md"} or path.is_absolute() or str(path).startswith((".", "~"))


def _lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """For each line: its number, its text, and the reason if it isn't UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), None
            except UnicodeDecodeError as error:
                yield number, line.decode(errors="replace"), f"not UTF-8: {error.reason} at byte {error.start + 1}"


def _jsonl(path: Path) -> Iterator[Row | Bad]:
    for number, line, reason in _lines(path):
        if line.strip():
            yield Bad(number, reason, line) if reason else _json_row(number, line)


def _json_row(number: int, line: str) -> Row | Bad:
    try:
        return _object(number, json.loads(line), line)
    except json.JSONDecodeError as error:
        return Bad(number, f"not JSON: {error.msg} at column {error.colno}", line)


def _object(number: int, value: Any, text: str) -> Row | Bad:
    if isinstance(value, dict):
        return Row(number, value)
    return Bad(number, f"expected an object with columns, got {_kind(value)}", text)


def _json(path: Path) -> Iterator[Row | Bad]:
    """A list of objects, or one object a line: both have the suffix .json."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    if not text.lstrip().startswith("["):
        yield from _jsonl(path)
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise Failure(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
    for number, value in enumerate(values, 1):
        yield _object(number, value, json.dumps(value))


def _table(path: Path) -> Iterator[Row | Bad]:
    """A table whose first line names the columns: .csv, .tsv."""
    csv.field_size_limit(2**31 - 1)  # texts can exceed the default limit
    broken: dict[int, str] = {}
    reader = csv.reader(_decoded(path, broken), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    names, start = next(reader, []), reader.line_num + 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "end of data" in str(error):
                raise Failure(f"{path}, line {start}: a quote that begins here is never closed.") from None
            yield Bad(start, f"not CSV: {error}")
            fields = []
        if fields is None:
            return
        if fields:
            yield _record(start, reader.line_num, names, fields, broken)
        start = reader.line_num + 1


def _decoded(path: Path, broken: dict[int, str]) -> Iterator[str]:
    for number, line, reason in _lines(path):
        if reason:
            broken[number] = reason
        yield line


def _record(start: int, end: int, names: Sequence[str], fields: Sequence[str], broken: dict[int, str]) -> Row | Bad:
    for number in range(start, end + 1):
        if number in broken:
            return Bad(number, broken[number], ",".join(fields))
    if len(fields) != len(names):
        return Bad(start, f"expected {len(names)} fields, got {len(fields)}", ",".join(fields))
    return Row(start, dict(zip(names, fields, strict=True)))


def _text(path: Path) -> Iterator[Row | Bad]:
    """A text file is one row; lines that aren't UTF-8 are skipped."""
    kept: list[str] = []
    for number, line, reason in _lines(path):
        if reason:
            yield Bad(number, reason, line)
        else:
            kept.append(line)
    yield Row(1, {"text": "".join(kept)})


def _parquet(path: Path) -> Iterator[Row | Bad]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise Failure("Reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        values = (value for batch in batches for value in batch.to_pylist())
        yield from (Row(number, value) for number, value in enumerate(values, 1))
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise Failure(f"{path} can't be read: {error}") from None


def _dataset(name: str, split: str, subset: str | None) -> Iterator[Row | Bad]:
    try:
        import datasets
    except ImportError:
        raise Failure(f"{name} is not a file; reading a dataset needs datasets: pip install datasets") from None
    try:
        found = _saved(name, split) if Path(name).is_dir() else datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets passes on errors of the network, files and names
        raise Failure(
            f"{name} is not a file, and datasets can't load it ({type(error).__name__}: {_first_line(error)})."
        ) from None
    return (Row(number, dict(value)) for number, value in enumerate(found, 1))


def _saved(directory: str, split: str) -> Any:
    """A directory written by ``save_to_disk``, or one of files that ``datasets`` can read."""
    import datasets

    saved = [Path(directory) / name for name in ("dataset_info.json", "dataset_dict.json")]
    if not any(path.exists() for path in saved):
        return datasets.load_dataset(directory, split=split)
    found = datasets.load_from_disk(directory)
    return found[split] if isinstance(found, datasets.DatasetDict) else found


READERS: dict[str, Callable[[Path], Iterator[Row | Bad]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}


def columns_of(given: str | None, row: Row) -> tuple[str, ...]:
    """The columns to train on: those given ("prompt,completion"), or else the first of ``KNOWN`` that the row has.

    Raises:
        Usage: the row lacks a column that was given, or has none of the known ones.
    """
    names = tuple(name.strip() for name in given.split(",")) if given else _known(row)
    has = ", ".join(map(str, row.values)) or "none"
    if not names:
        known = "; ".join(" and ".join(each) for each in KNOWN)
        raise Usage(f"The data has none of the known columns ({known}), but: {has}. Choose columns with --columns.")
    if len(names) > 2:
        raise Usage(f"--columns {given}: expected one column (text or messages) or two (prompt,completion).")
    if missing := [name for name in names if name not in row.values]:
        raise Usage(f"--columns {given}: the data has no column {' or '.join(missing)}. Choose from: {has}.")
    return names


def _known(row: Row) -> tuple[str, ...]:
    return next((names for names in KNOWN if set(names) <= set(row.values)), ())


def values_of(row: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    """The row's values in ``columns``.

    Raises:
        BadRow: one is missing.
    """
    for name in columns:
        if row.values.get(name) is None:
            raise BadRow(f"no {name!r}")
    return tuple(row.values[name] for name in columns)


def refuse(source: str, bad: Sequence[Bad]) -> None:
    """Raise ``Failure`` with line numbers and reasons if there are bad rows."""
    if not bad:
        return
    told = [f"  line {each.line}: {each.reason}" for each in bad[:_SHOWN]]
    more = [f"  and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    count = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
    head = f"{source}: {count} can't be used. Correct them, or skip them with --skip-bad."
    raise Failure("\n".join([head, *told, *more]))


def write_bad(bad: Iterable[Bad], path: Path) -> None:
    """Write line, reason and text of each skipped row as one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in bad), encoding="utf-8")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
