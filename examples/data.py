"""Real text for the demo: docstring -> code pairs from Python's standard library, or a file of yours.

The library is split by file before pairs are drawn, so no held-out file is trained on.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BYTE_VOCAB = 264  # 256 bytes, special tokens, padding: a size that no other dim of the demo's model has
IGNORED = -100  # the label that transformers' loss ignores
Pair = tuple[str, str]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """A tokenizer: how text becomes ids."""

    encode: Callable[[str], list[int]]
    start: tuple[int, ...]
    end: int
    pad: int


def byte_tokens() -> Tokens:
    """One token per byte, and three special tokens."""
    return Tokens(encode=lambda text: list(text.encode()), start=(256,), end=257, pad=258)


def hub_tokens(name: str) -> Tokens:
    """The tokenizer of a model on disk or on the hub."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    end = tokenizer.eos_token_id or 0
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Tokens(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], start, end, pad)


def library_files(held_out: float = 0.15) -> tuple[list[str], list[str]]:
    """Source texts of the standard library: (training, held out). `held_out`: the fraction of the files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "site-packages", "lib2to3", "encodings", "pydoc_data"}
    paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    cut = int(len(texts) * held_out)
    return texts[cut:], texts[:cut]


def pairs_of(source: str) -> Iterator[Pair]:
    """Each documented function of a module as (first line of the docstring, code without docstring)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (text := ast.get_docstring(node)):
            node.body = node.body[1:]
            yield f"# {text.strip().splitlines()[0]}\n", ast.unparse(node)


def library_pairs(sources: list[str], tokens: Tokens, length: int) -> list[Pair]:
    """The pairs that fit into `length` tokens, shuffled."""
    room = length - len(tokens.start) - 1
    pairs = [p for source in sources for p in pairs_of(source) if len(tokens.encode(p[0] + p[1])) <= room]
    random.Random(0).shuffle(pairs)
    return pairs


def file_pairs(path: Path, tokens: Tokens, length: int) -> list[Pair]:
    """Pairs from a .jsonl with `prompt` and `completion`, or windows of plain text without prompt, labelled in full."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".jsonl", ".json"}:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [(row["prompt"], row["completion"]) for row in rows]
    width = length * max(1, len(text[:10_000]) // max(1, len(tokens.encode(text[:10_000]))))
    return [("", text[i : i + width]) for i in range(0, len(text), width)]


def encode(pairs: list[Pair], tokens: Tokens, length: int) -> Batch:
    """Pairs as int64 tensors [N, length], padded on the right; labels of prompt and padding are ignored."""
    ids = torch.full((len(pairs), length), tokens.pad)
    labels = torch.full((len(pairs), length), IGNORED)
    mask = torch.zeros(len(pairs), length, dtype=torch.long)
    for row, (prompt, completion) in enumerate(pairs):
        head = [*tokens.start, *tokens.encode(prompt)]
        full = torch.tensor([*head, *tokens.encode(completion), tokens.end])[:length]
        ids[row, : len(full)], mask[row, : len(full)] = full, 1
        labels[row, len(head) : len(full)] = full[len(head) :]
    learnt = (labels != IGNORED).any(dim=1)
    return {"input_ids": ids[learnt], "attention_mask": mask[learnt], "labels": labels[learnt]}


def windows(sources: list[str], tokens: Tokens, length: int) -> Batch:
    """Running text as int64 tensors [N, length]; all tokens are labelled."""
    ids = torch.tensor(tokens.encode("\n".join(sources)))
    ids = ids[: len(ids) // length * length].view(-1, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def draw(data: Batch, batch: int, step: int) -> Batch:
    """The batch of a step: the same rows in every call for this step."""
    rows = torch.randperm(len(data["input_ids"]), generator=torch.Generator().manual_seed(step))[:batch]
    return {name: value[rows] for name, value in data.items()}
