"""Peak memory of a training step by length: full, LoRA, LoHa and QLoRA, each in plain PyTorch and with tokenseek.

    python benchmarks/memory.py --lengths 256 512 1024 2048 4096 --out benchmarks/results/memory.json

Each figure comes from a process of its own. A step is forward, backward and AdamW update. Peak memory is resident
memory beyond the model, so gradients and optimizer states count. It is the peak of three steps after compilation (from
the second on, optimizer states exist during the forward), with an allocator that returns freed tensors to the system at
once (glibc; see `worker.py`). The exit status is 1 if LoRA with tokenseek does not use less than full training with
tokenseek, and less than LoRA alone.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # compile in the process that is measured
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import measure
import torch
import transformers
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lycoris_utils import LycorisLayer
from report import table
from suite import console, machine
from torch import nn
from worker import EXACT_MEMORY

Result = dict[str, Any]
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 16384}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "use_cache": False}
BATCH, RANK, STEPS, RATE = 1, 8, 3, 1e-3
OPTIONS = {"keep_ratio": 0.1, "logits": "drop", "strict": True}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = (
    f"Llama with random weights: {SIZES['num_hidden_layers']} layers, hidden {SIZES['hidden_size']}, "
    f"MLP {SIZES['intermediate_size']}, {HEADS['num_attention_heads']} heads, "
    f"{HEADS['num_key_value_heads']} key/value heads, vocabulary {SIZES['vocab_size']}, float32; B = {BATCH}; "
    f"adapters of rank {RANK} on every linear of the blocks; QLoRA: NF4, double quantisation, computed in float32; "
    f"AdamW, learning rate {RATE}, {STEPS} steps on one batch; "
    'tokenseek: keep_ratio 0.1, logits "drop", the default scorer'
)


def base() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)).train()


def lora(model: nn.Module | None = None) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model or base(), config)


def loha() -> nn.Module:
    """LoHa without its dropout, whose random draw Dynamo can't trace (docs/setups.md)."""
    model = get_peft_model(base(), LoHaConfig(r=RANK, alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.training = False
    return model


def qlora() -> nn.Module:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as path:
        base().save_pretrained(path)
        load = transformers.LlamaForCausalLM.from_pretrained
        model = load(path, quantization_config=config, dtype=torch.float32, device_map="cpu")
    return lora(model.requires_grad_(False).train())


METHODS: dict[str, Callable[[], nn.Module]] = {"full": base, "LoRA": lora, "LoHa": loha, "QLoRA": qlora}
BACKENDS = ("plain", "tokenseek")


def work(method: str, backend: str, length: int) -> Result:
    """Measure one combination in this process: peak and saved bytes, loss, trained parameters."""
    for name in EXACT_MEMORY:  # this process has read it, and it would slow down the C++ compiler
        os.environ.pop(name, None)
    model = METHODS[method]()
    ids = torch.randint(SIZES["vocab_size"], (BATCH, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if backend == "tokenseek":
        model.compile(backend="tokenseek", options=OPTIONS)
    model(**batch).loss.backward()  # compiles
    saved = measure.saved_bytes(model, batch, SIZES["vocab_size"])
    model.zero_grad()
    with measure.PeakMemory() as peak:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
        losses = [step(model, batch, optimizer) for _ in range(STEPS)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"peak": peak.bytes, "saved": sum(saved.values()), "loss": losses[-1], "trained": trained}


def step(model: nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def spawn(method: str, backend: str, length: int) -> Result:
    """Run ``work`` in a new process, forked after all imports and before any computation."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply(work, (method, backend, length))
    console.print(f"{method:6} {backend:10} T = {length:5}: {result['peak'] / 1e6:7.1f} MB", highlight=False)
    return {"method": method, "backend": backend, "length": length, **result}


def markdown(results: list[Result], key: str, style: str = ".1f", unit: float = 1e6) -> str:
    """A table with a row for each method and backend and a column for each length."""
    lengths = sorted({result["length"] for result in results})
    rows: dict[str, list[str]] = {}
    for result in results:
        name = result["method"] + (" + tokenseek" if result["backend"] == "tokenseek" else "")
        rows.setdefault(name, []).append(format(result[key] / unit, style))
    head = ["", *(f"T = {length}" for length in lengths)]
    return table(head, [[name, *cells] for name, cells in rows.items()])


def tables(results: list[Result]) -> list[str]:
    """Peak memory and saved bytes in megabytes, and the loss of the last step."""
    return [markdown(results, "peak"), markdown(results, "saved"), markdown(results, "loss", ".3f", 1)]


def broken_claims(results: list[Result]) -> list[str]:
    """Lengths at which LoRA with tokenseek doesn't use less than full training with tokenseek and than LoRA alone."""
    peak = {(result["method"], result["backend"], result["length"]): result["peak"] for result in results}
    return [
        f"T = {length}: LoRA with tokenseek {bytes_}, {method} {backend} {peak[method, backend, length]}"
        for (adapter, by, length), bytes_ in peak.items()
        if (adapter, by) == ("LoRA", "tokenseek")
        for method, backend in [("full", "tokenseek"), ("LoRA", "plain")]
        if bytes_ >= peak[method, backend, length]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--out", type=Path, default=Path("out/bench/memory.json"))
    options = parser.parse_args()
    if not EXACT_MEMORY.items() <= os.environ.items():  # the allocator reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | EXACT_MEMORY)
    results = [spawn(m, backend, length) for m in METHODS for backend in BACKENDS for length in options.lengths]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "settings": SETTINGS, "results": results}, indent=1))
    console.print(*tables(results), *broken_claims(results), sep="\n", highlight=False)
    return int(bool(broken_claims(results)))


if __name__ == "__main__":
    sys.exit(main())
