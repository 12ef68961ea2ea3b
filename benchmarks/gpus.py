"""Estimates, not measurements: the longest sequence that fits into GPUs of 24, 48, 80 and 141 GB.

    python benchmarks/gpus.py --out benchmarks/results/gpus.json

Shapes of Llama 3 in bfloat16, one sequence, full training and LoRA with AdamW (its states in bfloat16, updated one parameter at
a time or fused), plain ``torch.compile`` beside tokenseek. No GPU and no weights are needed: `tokenseek_fx.estimate` sees models
on the meta device. So that it takes minutes, models of `DEPTHS` layers are estimated at `LENGTHS` tokens. What is held in each
phase grows by the same bytes with every layer alike: the line through the two depths is taken at the true depth. Between two
lengths a line is taken as well, so lengths are rounded down to whole thousands; beyond the longest it is said so.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from suite import console, machine
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokenseek_fx
from tokenseek_fx.estimate import GPUS

Phases = dict[str, float]
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
    },
    "Llama-3.2-3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
}
SHARED = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "use_cache": False}
TIED = {"Llama-3.2-1B": True, "Llama-3.2-3B": True, "Llama-3.1-8B": False}
METHODS, DEPTHS, LENGTHS = ("full", "LoRA"), (2, 3), (2048, 8192, 32768)
OPTIONS = {"keep_ratio": 0.1, "logits": "drop"}
SETTINGS = (
    'bfloat16, B = 1, AdamW; tokenseek: keep_ratio 0.1, logits "drop", the default scorer; LoRA of rank 16 on q, k, v and o; '
    "GB: 10^9 bytes"
)


def model(shape: str, method: str, layers: int) -> nn.Module:
    config = LlamaConfig(**SHARED, **{**SHAPES[shape], "num_hidden_layers": layers}, tie_word_embeddings=TIED[shape])
    with torch.device("meta"):
        plain = LlamaForCausalLM(config).train()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(plain, lora) if method == "LoRA" else plain


def phases(shape: str, method: str, length: int) -> dict[str, Phases]:
    """Bytes of a phase at the true depth, from two smaller ones, for both ways to train."""
    found = [_phases(model(shape, method, layers), length) for layers in DEPTHS]
    (near, far), depth = DEPTHS, SHAPES[shape]["num_hidden_layers"]
    share = (depth - near) / (far - near)
    return {
        way: {phase: size + share * (found[1][way][phase] - size) for phase, size in sizes.items()}
        for way, sizes in found[0].items()
    }


def _phases(model: nn.Module, length: int) -> dict[str, Phases]:
    found = tokenseek_fx.estimate(model, 1, length, options=OPTIONS, dtype=torch.bfloat16)
    return {"tokenseek": found.phases(), "torch.compile": found.phases(found.plain)}


def longest(peaks: dict[int, float], size: float) -> str:
    """The longest sequence with a peak of at most ``size`` bytes, in thousands of tokens."""
    lengths = sorted(peaks)
    if peaks[lengths[-1]] <= size:
        return f"over {lengths[-1] // 1000}k"
    if peaks[lengths[0]] > size:
        return f"under {lengths[0] // 1000}k" if peaks[lengths[0]] < 2 * size else "none"
    low = max(length for length in lengths if peaks[length] <= size)
    high = lengths[lengths.index(low) + 1]
    share = (size - peaks[low]) / (peaks[high] - peaks[low])
    return f"{int(low + share * (high - low)) // 1000}k"


def rows(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A row for every shape, method and way to train."""
    for shape, method, way in dict.fromkeys((r["shape"], r["method"], way) for r in results for way in r["phases"]):
        mine = [r for r in results if (r["shape"], r["method"]) == (shape, method)]
        peaks = {r["length"]: max(r["phases"][way].values()) for r in mine}
        sizes = [f"{peaks[length] / 1e9:.1f}" for length in sorted(peaks)]
        yield [f"{shape}, {method}, {way}", *sizes, *(longest(peaks, gpu * 1e9) for gpu in GPUS)]


def markdown(results: list[dict[str, Any]]) -> str:
    lengths = sorted({r["length"] for r in results})
    head = ["estimate", *(f"GB at T = {length}" for length in lengths), *(f"longest in {gpu} GB" for gpu in GPUS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows(results)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--out", type=Path, default=Path("out/bench/gpus.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for shape in options.shapes:
        for method in options.methods:
            for length in options.lengths:
                found = {"shape": shape, "method": method, "length": length, "phases": phases(shape, method, length)}
                results.append(found)
                console.print(found, highlight=False)
                figures = {"machine": machine(), "settings": SETTINGS, "results": results}
                options.out.write_text(json.dumps(figures, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(f"{SETTINGS}\n\n{markdown(results)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
