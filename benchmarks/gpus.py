"""The figures of the GPU suite estimated, not measured, for GPUs that are not available.

    python benchmarks/gpus.py --out benchmarks/results/gpus.json

The peak memory of a step in the suite's first setting, and the longest sequence that fits into 24, 48, 80 and 141 GB.
The shapes are those of Llama 3 in bfloat16, one sequence, full training and LoRA with AdamW (its states in bfloat16,
updated one parameter at a time or fused), with plain ``torch.compile`` and with tokenseek. No GPU or weights are
needed: `tokenseek_fx.estimate` uses models on the meta device, with the chunks and kernels of a GPU.

To take minutes only, it estimates models of `DEPTHS` layers at `LENGTHS` tokens. Each layer adds the same bytes to each
phase, so the line through the two depths gives the true depth. Lengths are interpolated linearly too, and rounded down
to whole thousands; a result beyond the longest length is marked. Results in the file are not estimated again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from report import table
from suite import console, machine
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokenseek_fx
from tokenseek_fx.estimation import GPUS

Phases = dict[str, float]
Ways = dict[str, Phases]
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
METHODS, DEPTHS, LENGTHS = ("full", "LoRA"), (3, 4), (2048, 8192, 32768, 131072)
STEP, BATCH, LENGTH = "Llama-3.2-1B", 8, 4096  # the first setting of gpu.py
OPTIONS = {"keep_ratio": 0.1, "logits": "drop", "recompute": "rows"}  # the default isn't linear in the depth
SETTINGS = (
    'bfloat16, B = 1, AdamW; tokenseek: keep_ratio 0.1, logits "drop", recompute "rows", the default scorer; '
    "LoRA of rank 16 on q, k, v and o; GB: 10^9 bytes"
)


def model(shape: str, method: str, layers: int) -> nn.Module:
    config = LlamaConfig(**SHARED, **{**SHAPES[shape], "num_hidden_layers": layers}, tie_word_embeddings=TIED[shape])
    with torch.device("meta"):
        plain = LlamaForCausalLM(config).train()
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(plain, lora) if method == "LoRA" else plain


def at_depth(shape: str, of_layers: Callable[[int], Ways]) -> Ways:
    """Bytes of each phase at the true depth, extrapolated from two smaller depths."""
    (near, far), depth = DEPTHS, SHAPES[shape]["num_hidden_layers"]
    found, share = [of_layers(layers) for layers in DEPTHS], (depth - near) / (far - near)
    return {
        way: {phase: size + share * (found[1][way][phase] - size) for phase, size in sizes.items()}
        for way, sizes in found[0].items()
    }


def phases(shape: str, method: str, length: int) -> Ways:
    """All bytes that a training step of one sequence holds, by way and phase."""

    def of_layers(layers: int) -> Ways:
        found = estimated(model(shape, method, layers), 1, length)
        return {"tokenseek": found.phases(), "torch.compile": found.phases(found.plain)}

    return at_depth(shape, of_layers)


def step() -> Ways:
    """Bytes that forward and backward hold beyond weights and gradients, in the first setting of the GPU suite."""

    def of_layers(layers: int) -> Ways:
        found = estimated(model(STEP, "full", layers), BATCH, LENGTH, set_to_none=False)
        steps = {"tokenseek": found.step, "torch.compile": found.plain}
        return {way: {"forward": each.forward, "backward": each.backward} for way, each in steps.items()}

    return at_depth(STEP, of_layers)


def estimated(made: nn.Module, batch: int, length: int, **how: Any) -> tokenseek_fx.Estimate:
    return tokenseek_fx.estimate(
        made, batch, length, options=OPTIONS, dtype=torch.bfloat16, device="cuda", optimizer="adamw", **how
    )


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
    """A row for each shape, method and way to train."""
    for shape, method, way in dict.fromkeys((r["shape"], r["method"], way) for r in results for way in r["phases"]):
        mine = [r for r in results if (r["shape"], r["method"]) == (shape, method)]
        peaks = {r["length"]: max(r["phases"][way].values()) for r in mine}
        sizes = [f"{peaks[length] / 1e9:.1f}" for length in sorted(peaks)]
        yield [f"{shape}, {method}, {way}", *sizes, *(longest(peaks, gpu * 1e9) for gpu in GPUS)]


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of memory by length and of the longest sequences."""
    lengths = sorted({r["length"] for r in results})
    head = ["estimate", *(f"GB at T = {length}" for length in lengths), *(f"longest in {gpu} GB" for gpu in GPUS)]
    return table(head, list(rows(results)))


def markdown_of_step(found: Ways) -> str:
    """The table of the suite's first setting."""
    head = [f"estimate, {STEP}, {BATCH} x {LENGTH} tokens", "GB in forward", "GB in backward"]
    lines = [[way, *(f"{sizes[phase] / 1e9:.2f}" for phase in ("forward", "backward"))] for way, sizes in found.items()]
    return table(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--out", type=Path, default=Path("out/bench/gpus.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text()) if options.out.exists() else {"step": step(), "results": []}
    figures = {"machine": machine(), "settings": SETTINGS, **known}
    there = {(r["shape"], r["method"], r["length"]) for r in figures["results"]}
    for point in (p for p in product(options.shapes, options.methods, options.lengths) if p not in there):
        found = {**dict(zip(("shape", "method", "length"), point, strict=True)), "phases": phases(*point)}
        figures["results"].append(found)
        console.print(found, highlight=False)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
        tables = (SETTINGS, markdown_of_step(figures["step"]), markdown(figures["results"]))
        options.out.with_suffix(".md").write_text("\n\n".join(tables) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
