"""Encode rows as tokens: label the text to train on, truncate to a length, pad to a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .answer import Failure, Usage
from .data import Bad, BadRow, Row, columns_of, refuse, values_of

IGNORED = -100  # the label that transformers' losses ignore
_MULTIPLE = 16  # batches are padded to multiples of it: the compiler sees fewer sizes


@dataclass(frozen=True)
class Text:
    """Text and its labelled spans ``learnt``, each ``(start, end)`` in characters.

    ``whole``: the text is one sequence and is truncated if too long; otherwise every window of ``length`` tokens is a
    sequence. ``end``: add the tokenizer's begin and end tokens.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]
    whole: bool = True
    end: bool = True


@dataclass(frozen=True)
class Sequences:
    """Encoded rows. ``sequences``: ``{"input_ids", "labels"}`` of each. ``cut``: the number of truncated ones."""

    sequences: list[dict[str, list[int]]]
    columns: tuple[str, ...]
    rows: int
    cut: int
    bad: list[Bad]

    @property
    def tokens(self) -> int:
        return sum(len(each["input_ids"]) for each in self.sequences)

    @property
    def labelled(self) -> int:
        return sum(label != IGNORED for each in self.sequences for label in each["labels"][1:])


def sequences(
    found: Iterable[Row | Bad], tokenizer: Any, length: int, columns: str | None, source: str, skip_bad: bool
) -> Sequences:
    """Encode rows as sequences of at most ``length`` tokens.

    Raises:
        Failure: rows can't be used and ``skip_bad`` is off, or no row is left.
        Usage: the data lacks the columns.
    """
    encoder = Encoder(tokenizer, length, columns)
    for each in found:
        encoder.take(each)
    if encoder.unknown and not encoder.columns:
        raise encoder.unknown
    if not skip_bad:
        refuse(source, encoder.bad)
    if not encoder.made:
        raise Failure(f"{source}: no row is left to train on ({len(encoder.bad)} can't be used).")
    return Sequences(encoder.made, encoder.columns, encoder.rows, encoder.cut, encoder.bad)


@dataclass
class Encoder:
    """Collects the sequences of the rows that it takes, and the bad rows."""

    tokenizer: Any
    length: int
    given: str | None
    columns: tuple[str, ...] = ()
    rows: int = 0
    cut: int = 0
    unknown: Usage | None = None
    made: list[dict[str, list[int]]] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise Failure("The tokenizer doesn't report the characters of a token. Use a fast tokenizer.")
        first = self.tokenizer("a")["input_ids"][:1]
        self.start = first if first == [self.tokenizer.bos_token_id] else []

    def take(self, row: Row | Bad) -> None:
        if isinstance(row, Bad):
            self.bad.append(row)
            return
        try:
            self.columns = self.columns or columns_of(self.given, row)
            made = self._encode(text_of(values_of(row, self.columns), self.tokenizer))
        except (BadRow, Usage) as error:  # the first row with known columns decides the columns
            self.unknown = self.unknown or (error if isinstance(error, Usage) else None)
            self.bad.append(Bad(row.line, str(error), str(row.values)))
            return
        self.rows += 1
        self.made += made

    def _encode(self, text: Text) -> list[dict[str, list[int]]]:
        found = self.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = found["input_ids"], found["offset_mapping"]
        labels = [each if _overlaps(span, text.learnt) else IGNORED for each, span in zip(ids, spans, strict=True)]
        if text.end:
            ids, labels = [*self.start, *ids], [IGNORED] * len(self.start) + labels
            end = self.tokenizer.eos_token_id
            ids, labels = (ids, labels) if end is None else ([*ids, end], [*labels, end])
        return [self._cut(ids, labels)] if text.whole else self._windows(ids, labels)

    def _cut(self, ids: list[int], labels: list[int]) -> dict[str, list[int]]:
        self.cut += len(ids) > self.length
        ids, kept = ids[: self.length], labels[: self.length]
        if all(label == IGNORED for label in kept[1:]):
            before = next((i for i, label in enumerate(labels) if i and label != IGNORED), len(labels))
            raise BadRow(f"no label in the first {self.length} tokens: {before} tokens precede it; raise --length")
        return {"input_ids": ids, "labels": kept}

    def _windows(self, ids: list[int], labels: list[int]) -> list[dict[str, list[int]]]:
        if len(ids) < 2:
            raise BadRow("no text")
        starts = [i for i in range(0, len(ids), self.length) if len(ids) - i > 1]
        return [{"input_ids": ids[i : i + self.length], "labels": labels[i : i + self.length]} for i in starts]


def text_of(values: Sequence[Any], tokenizer: Any) -> Text:
    """The text of a row and its labelled spans: the assistant's messages, a prompt's completion, or all of a text.

    Raises:
        BadRow: a value has the wrong type or is empty.
    """
    if len(values) == 2:
        prompt, completion = (
            _checked(value, name) for value, name in zip(values, ("prompt", "completion"), strict=True)
        )
        if not completion:
            raise BadRow("the completion is empty")
        return Text(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))
    if isinstance(values[0], list):
        return _conversation(values[0], tokenizer)
    text = _checked(values[0], "text")
    if not text.strip():
        raise BadRow("the text is empty")
    return Text(text, ((0, len(text)),), whole=False)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name}: expected text, got {type(value).__name__}")
    return value


def _conversation(messages: list[Any], tokenizer: Any) -> Text:
    """Messages in the tokenizer's template. The assistant's are labelled, with the tokens that end each of them."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow(f"message {number} has no role and content")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRow("no message has the role assistant")
    write = _template(tokenizer)
    text = write(messages, False)
    learnt = tuple(_turn(write, messages, i, text) for i in turns)
    return Text(text, learnt, end=False)


def _turn(write: Callable[[Any, bool], str], messages: list[Any], i: int, text: str) -> tuple[int, int]:
    before, after = write(messages[:i], True), write(messages[: i + 1], False)
    if not (text.startswith(before) and text.startswith(after)):
        raise BadRow(
            f"the chat template changes message {i + 1} when later messages follow; split the conversation there"
        )
    return len(before), len(after)


def _template(tokenizer: Any) -> Callable[[Any, bool], str]:
    if not tokenizer.chat_template:
        raise Failure(
            "The data has messages, but the tokenizer has no chat template. Pass one with --chat-template FILE."
        )

    def write(messages: Any, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise errors of any type (jinja2's TemplateError, TypeError)
            raise BadRow(f"the chat template fails: {error}") from None

    return write


def _overlaps(span: tuple[int, int], learnt: Iterable[tuple[int, int]]) -> bool:
    return any(span[0] < end and span[1] > start for start, end in learnt)


def batch_of(rows: Sequence[dict[str, list[int]]], pad: int, length: int) -> dict[str, Tensor]:
    """Collate sequences to int64 tensors [B, T]: ``input_ids``, ``labels``, ``attention_mask``.

    They are padded on the right to a multiple of 16 (at most ``length``), with labels -100.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    size = min(-(-longest // _MULTIPLE) * _MULTIPLE, max(length, longest))

    def padded(values: Sequence[list[int]], value: int) -> Tensor:
        return torch.tensor([each + [value] * (size - len(each)) for each in values])

    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    mask = padded([[1] * len(each) for each in ids], 0)
    return {"input_ids": padded(ids, pad), "labels": padded(labels, IGNORED), "attention_mask": mask}
