"""Peak memory of one training step: full, LoRA, LoHa and QLoRA, each by torch.compile and with tokenseek, by length.

    python benchmarks/memory.py --lengths 256 512 1024 2048 4096 --out benchmarks/results/memory.json

Every figure comes from a process of its own. A step is forward, backward and AdamW update; peak memory is resident memory above
the model alone, so gradients and optimizer states count. The measured step is the first of an optimizer after the graphs
were compiled, with an allocator that gives every tensor back at once (glibc; see `step.py`). The exit status is 1 where LoRA with
tokenseek does not use less than full training with tokenseek and than LoRA alone.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import measure
import torch
import transformers
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lycoris_utils import LycorisLayer
from step import EXACT_MEMORY, console, machine
from torch import nn

Result = dict[str, Any]
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 2048}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "use_cache": False}
M_MMAP_THRESHOLD = -3  # malloc.h
BATCH, RANK, STEPS, RATE = 2, 8, 4, 1e-3
OPTIONS = {"keep_ratio": 0.1, "logits": "drop", "strict": True}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = (
    f"Llama with random weights: {SIZES['num_hidden_layers']} layers, hidden {SIZES['hidden_size']}, MLP {SIZES['intermediate_size']}, "
    f"{HEADS['num_attention_heads']} heads, {HEADS['num_key_value_heads']} key/value heads, vocabulary {SIZES['vocab_size']}, float32; "
    f"B = {BATCH}; adapters of rank {RANK} on every linear of the blocks; QLoRA: NF4, double quantisation, computed in float32; "
    f'AdamW, learning rate {RATE}; tokenseek: keep_ratio 0.1, logits "drop", the default scorer'
)


def base() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)).train()


def lora(model: nn.Module | None = None) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model or base(), config)


def loha() -> nn.Module:
    """Without its dropout, whose draw Dynamo can't trace (docs/setups.md)."""
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
BACKENDS: dict[str, dict[str, Any]] = {"plain": {}, "tokenseek": {"backend": "tokenseek", "options": OPTIONS}}


def work(method: str, backend: str, length: int) -> Result:
    """One figure, in this process."""
    model = METHODS[method]()
    ids = torch.randint(SIZES["vocab_size"], (BATCH, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    model.compile(**BACKENDS[backend])
    model(**batch).loss.backward()  # compiles
    saved = measure.saved_bytes(model, batch, SIZES["vocab_size"])
    model.zero_grad()
    return_every_tensor_at_once()
    with measure.PeakMemory() as peak:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
        losses = [step(model, batch, optimizer)]
    losses += [step(model, batch, optimizer) for _ in range(STEPS)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"peak": peak.bytes, "saved": sum(saved.values()), "losses": losses, "trained": trained}


def return_every_tensor_at_once() -> None:
    """What `step.EXACT_MEMORY` does, from here on: it would slow the compiler down."""
    (threshold,) = map(int, EXACT_MEMORY.values())
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, threshold)


def step(model: nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def spawn(method: str, backend: str, length: int) -> Result:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--worker", method, backend, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method}, {backend}, T = {length} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    console.print(f"{method:6} {backend:10} T = {length:5}: {result['peak'] / 1e6:7.1f} MB", highlight=False)
    return {"method": method, "backend": backend, "length": length, **result}


def markdown(results: list[Result], key: str) -> str:
    """A table of megabytes: a row for every method and backend, a column for every length."""
    lengths = sorted({result["length"] for result in results})
    rows: dict[str, list[str]] = {}
    for result in results:
        name = result["method"] + (" + tokenseek" if result["backend"] == "tokenseek" else "")
        rows.setdefault(name, []).append(f"{result[key] / 1e6:.1f}")
    head = ["", *(f"T = {length}" for length in lengths)]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def broken_claims(results: list[Result]) -> list[str]:
    """Where LoRA with tokenseek does not use less than full training with tokenseek and than LoRA alone."""
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
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        method, backend, length = options.worker
        print(json.dumps(work(method, backend, int(length))))
        return 0
    results = [spawn(m, backend, length) for m in METHODS for backend in BACKENDS for length in options.lengths]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "settings": SETTINGS, "results": results}, indent=1))
    console.print(markdown(results, "peak"), *broken_claims(results), sep="\n", highlight=False)
    return int(bool(broken_claims(results)))


if __name__ == "__main__":
    sys.exit(main())
