"""Rows as tokens: which of their text is learnt, cut to a length, padded to a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .answer import Failure, Usage
from .data import Bad, BadRow, Row, columns_of, refuse, values_of

IGNORED = -100  # the label that transformers' losses leave out
_MULTIPLE = 16  # lengths of batches: fewer sizes for the compiler


@dataclass(frozen=True)
class Text:
    """Text, and the parts of it that are learnt, as ``(start, end)`` in characters. ``whole``: an end token is added, and what is
    too long is cut; else it is running text, of which every window of ``length`` tokens is a sequence."""

    text: str
    learnt: tuple[tuple[int, int], ...]
    whole: bool = True
    end: bool = True


@dataclass(frozen=True)
class Sequences:
    """``sequences``: ``{"input_ids", "labels"}`` for each. ``cut``: how many lost their end to ``length``."""

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
    """Encode rows; a sequence has at most ``length`` tokens.

    Raises:
        Failure: rows can't be used and ``skip_bad`` is off, or none is left.
        Usage: the columns aren't there.
    """
    encoder = Encoder(tokenizer, length, columns)
    for each in found:
        encoder.take(each)
    if encoder.unknown and not encoder.columns:
        raise encoder.unknown
    if not skip_bad:
        refuse(source, encoder.bad)
    if not encoder.made:
        raise Failure(f"{source}: no row is left to learn from ({len(encoder.bad)} can't be used).")
    return Sequences(encoder.made, encoder.columns, encoder.rows, encoder.cut, encoder.bad)


@dataclass
class Encoder:
    """Takes rows, keeps sequences and bad rows."""

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
            raise Failure("The tokenizer doesn't tell which characters a token stands for: a fast tokenizer is needed.")
        first = self.tokenizer("a")["input_ids"][:1]
        self.start = first if first == [self.tokenizer.bos_token_id] else []

    def take(self, row: Row | Bad) -> None:
        if isinstance(row, Bad):
            self.bad.append(row)
            return
        try:
            self.columns = self.columns or columns_of(self.given, row)
            made = self._encode(text_of(values_of(row, self.columns), self.tokenizer))
        except (BadRow, Usage) as error:  # columns are those of the first row that has any
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
            raise BadRow(f"nothing to learn in the first {self.length} tokens: {before} stand before it (--length)")
        return {"input_ids": ids, "labels": kept}

    def _windows(self, ids: list[int], labels: list[int]) -> list[dict[str, list[int]]]:
        if len(ids) < 2:
            raise BadRow("no text")
        starts = [i for i in range(0, len(ids), self.length) if len(ids) - i > 1]
        return [{"input_ids": ids[i : i + self.length], "labels": labels[i : i + self.length]} for i in starts]


def text_of(values: Sequence[Any], tokenizer: Any) -> Text:
    """What is learnt of a row: of messages the assistant's, of a prompt and its completion the latter, of a text all.

    Raises:
        BadRow: the values aren't of that kind.
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
        raise BadRow(f"the {name} is no text, but of type {type(value).__name__}")
    return value


def _conversation(messages: list[Any], tokenizer: Any) -> Text:
    """Messages in the tokenizer's own template: the assistant's are learnt, with what ends each of them."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow(f"message {number} has no role and content")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRow("no message is the assistant's")
    write = _template(tokenizer)
    text = write(messages, False)
    learnt = tuple(_turn(write, messages, i, text) for i in turns)
    return Text(text, learnt, end=False)


def _turn(write: Callable[[Any, bool], str], messages: list[Any], i: int, text: str) -> tuple[int, int]:
    before, after = write(messages[:i], True), write(messages[: i + 1], False)
    if not (text.startswith(before) and text.startswith(after)):
        raise BadRow(f"the chat template writes message {i + 1} otherwise once others follow; split the conversation")
    return len(before), len(after)


def _template(tokenizer: Any) -> Callable[[Any, bool], str]:
    if not tokenizer.chat_template:
        raise Failure(
            "The tokenizer has no chat template, but the data has messages: give one with --chat-template FILE."
        )

    def write(messages: Any, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template raises what it likes (jinja2's TemplateError, TypeError)
            raise BadRow(f"the chat template refuses it: {error}") from None

    return write


def _overlaps(span: tuple[int, int], learnt: Iterable[tuple[int, int]]) -> bool:
    return any(span[0] < end and span[1] > start for start, end in learnt)


def batch_of(rows: Sequence[dict[str, list[int]]], pad: int, length: int) -> dict[str, Tensor]:
    """Sequences as int64 tensors [B, T], padded on the right to a multiple of 16 (at most ``length``); labels there are -100."""
    longest = max(len(row["input_ids"]) for row in rows)
    size = min(-(-longest // _MULTIPLE) * _MULTIPLE, max(length, longest))

    def padded(values: Sequence[list[int]], value: int) -> Tensor:
        return torch.tensor([each + [value] * (size - len(each)) for each in values])

    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    mask = padded([[1] * len(each) for each in ids], 0)
    return {"input_ids": padded(ids, pad), "labels": padded(labels, IGNORED), "attention_mask": mask}
