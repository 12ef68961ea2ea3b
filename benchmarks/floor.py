"""Bytes saved for backward, compared with the lower bound, for several architectures. Nothing is executed.

    python benchmarks/floor.py --out benchmarks/results/floor.json

The lower bound is keys and values before heads are repeated, plus for each kept row the bytes that the plain graph
saves per token or, with `recompute="rows"`, one row at the input of each block and of the head (`passes/floor.py`). The
exit status is 1 if more than 15 % above it is saved.
"""

import argparse
import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from report import table

import tokenseek_fx

BATCH, LENGTH, WIDTH, INNER, LAYERS, HEADS, WORDS = 2, 512, 256, 768, 2, 8, 2048
SETTINGS = (
    f"{LAYERS} layers, hidden {WIDTH}, MLP {INNER}, {HEADS} heads, vocabulary {WORDS}, float32, no dropout; "
    f'B = {BATCH}, T = {LENGTH}, keep_ratio 0.1, logits "drop", the default scorer'
)
_COMMON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER}
_TWO = {**_COMMON, "num_key_value_heads": 2}
_DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INNER, "n_positions": LENGTH}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama, 2 key heads": ("Llama", "ForCausalLM", _TWO),
    "Qwen3, 2 key heads": ("Qwen3", "ForCausalLM", {**_TWO, "head_dim": WIDTH // HEADS}),
    "GPT-2": ("GPT2", "LMHeadModel", {**_GPT2, **_DRY}),
    "GPT-NeoX": ("GPTNeoX", "ForCausalLM", {**_COMMON, **_DRY}),
}
WAYS = ("none", "rows")


def build(name: str) -> torch.nn.Module:
    family, kind, sizes = ARCHITECTURES[name]
    common = {
        "vocab_size": WORDS,
        "max_position_embeddings": LENGTH,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**common, **sizes)
    return getattr(transformers, f"{family}{kind}")(config).train()


def measure(name: str, way: str) -> dict[str, Any]:
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    torch._dynamo.reset()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"logits": "drop", "strict": True, "recompute": way}
        report = tokenseek_fx.explain(build(name), input_ids=ids, labels=ids, options=options)
    result = {
        "model": name,
        "way": way,
        "plain": report.plain.bytes,
        "saved": report.rewritten.bytes,
        "floor": report.floor,
    }
    print(f"{name:20} {way:20} {result['saved'] / 1e6:7.2f} MB, floor {result['floor'] / 1e6:7.2f} MB", flush=True)
    return result


def markdown(results: list[dict[str, Any]]) -> str:
    """A row for each model, in megabytes: saved by the plain graph, then for each way saved / lower bound."""
    rows = {result["model"]: [f"{result['plain'] / 1e6:.1f}"] for result in results}
    for result in results:
        rows[result["model"]].append(f"{result['saved'] / 1e6:.2f} / {result['floor'] / 1e6:.2f}")
    head = ["", "plain graph", *(f"`{way}`" for way in WAYS)]
    return table(head, [[name, *cells] for name, cells in rows.items()])


def above(results: list[dict[str, Any]]) -> list[str]:
    """The results that save more than 15 % above the lower bound."""
    return [f"{r['model']}, {r['way']}: {r['saved']} {r['floor']}" for r in results if r["saved"] > 1.15 * r["floor"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/bench/floor.json"))
    options = parser.parse_args()
    results = [measure(name, way) for name in ARCHITECTURES for way in WAYS]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"settings": SETTINGS, "results": results}, indent=1) + "\n")
    print(markdown(results), *above(results), sep="\n")
    return int(bool(above(results)))


if __name__ == "__main__":
    sys.exit(main())
