"""Accuracy of ``tokenseek_fx.estimate``: the estimated and the measured peak memory of a training step.

    python benchmarks/estimate.py --out benchmarks/results/estimate.json

Each measurement and each estimate runs in a process of its own; estimates use models on the meta device. The measured
figure is peak resident memory beyond the model, over two steps after compilation, with an allocator that returns freed
tensors to the system at once (glibc; see `worker.py`). It covers forward, backward and, with an optimizer, its update
and states; without one, gradients exist before and are not counted. Results in the file are not measured again. The
exit status is 1 if an estimate is off by more than 10 %.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # compile in the process that is measured
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import measure
import torch
import transformers
from peft import LoraConfig, get_peft_model
from report import table
from suite import console, machine
from torch import nn
from worker import EXACT_MEMORY

import tokenseek_fx

Result = dict[str, Any]
Batch = dict[str, torch.Tensor]
VOCAB, ALLOWED = 8000, 0.10


def llama(kv_heads: int = 2, layers: int = 2, **more: Any) -> nn.Module:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "max_position_embeddings": 4096}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False, **more))


def lora() -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(llama(), LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=384, n_layer=2, n_head=6, n_positions=1024, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 6}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, **sizes))


def t5() -> nn.Module:
    sizes = {
        "d_model": 384,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 2,
        "num_heads": 6,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB, **sizes, use_cache=False))


def vit() -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 6}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=10))


def qwen3() -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads, use_cache=False))


def tokens(batch: int, length: int) -> Batch:
    ids = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def images(batch: int, length: int) -> Batch:
    """Images of 224 x 224 pixels: 196 patches and a class token. ``length`` is ignored."""
    return {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.arange(batch) % 10}


@dataclass(frozen=True)
class Setting:
    """A model, a batch, and the options of the backend (None: plain ``torch.compile``)."""

    name: str
    model: Callable[[], nn.Module]
    batch: int
    length: int
    options: dict[str, Any] | None
    optimizer: str | None = None
    inputs: Callable[[int, int], Batch] = tokens

    def __str__(self) -> str:
        options = (
            ", ".join(f"{name} {value}" for name, value in self.options.items()) if self.options else "torch.compile"
        )
        return (
            f"{self.name}, B={self.batch} T={self.length}, {options}{f', {self.optimizer}' if self.optimizer else ''}"
        )


def kept(ratio: float, logits: str = "drop", **more: Any) -> dict[str, Any]:
    return {"keep_ratio": ratio, "logits": logits, **more}


def mha() -> nn.Module:
    return llama(kv_heads=8)


def half() -> nn.Module:
    return llama(layers=3).bfloat16()


def neox() -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = transformers.GPTNeoXConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=1024, use_cache=False)
    return transformers.GPTNeoXForCausalLM(config)


SETTINGS = [
    Setting("Llama, 2 key/value heads", llama, 4, 1024, kept(0.1)),
    Setting("Llama, 2 key/value heads", llama, 4, 1024, None),
    Setting("Llama, 8 key/value heads", mha, 8, 512, kept(0.25, "keep", scorer="random")),
    Setting("Llama, 8 key/value heads", mha, 8, 256, kept(1, "drop", recompute="none")),
    Setting("Llama, 2 key/value heads", llama, 1, 2048, kept(0.05, scorer="attention"), "adamw"),
    Setting("Llama, LoRA", lora, 1, 2048, kept(0.1)),
    Setting("Llama, LoRA", lora, 2, 512, None, "adamw"),
    Setting("Llama, 2 key/value heads", llama, 1, 8192, kept(0.1)),
    Setting("Llama, 8 key/value heads", mha, 2, 1024, kept(0.1, kv="recompute", recompute="rows")),
    Setting("Llama, bfloat16", half, 4, 512, kept(0.2)),
    Setting("GPT-NeoX", neox, 4, 512, kept(0.1, chunk_bytes=2**20), "adamw"),
    Setting("GPT-2, dropout", gpt2, 4, 512, kept(0.1, scorer="attention")),
    Setting("GPT-2, dropout", gpt2, 8, 256, None),
    Setting("BERT, masked words", bert, 4, 512, kept(0.5, "keep")),
    Setting("T5, two token axes", t5, 4, 256, kept(0.2)),
    Setting("ViT, a class of each image", vit, 8, 197, kept(0.3, "keep", scorer="attention"), inputs=images),
    Setting("Qwen3", qwen3, 2, 1024, kept(0.1, scorer="tokenseek"), "adamw"),
    Setting("Qwen3", qwen3, 2, 1024, None, "sgd"),
]


def measured(index: int) -> int:
    """Peak resident bytes beyond the model and, without an optimizer, beyond its gradients."""
    for name in EXACT_MEMORY:  # this process has read it, and it would slow down the C++ compiler
        os.environ.pop(name, None)
    setting = SETTINGS[index]
    torch.manual_seed(0)
    model, batch = setting.model().train(), setting.inputs(setting.batch, setting.length)
    if setting.options is None:
        model.compile()
    else:
        model.compile(backend="tokenseek", options={**setting.options, "strict": True})
    model(**batch).loss.backward()  # compiles
    updates = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, None: None}[setting.optimizer]
    if updates is not None:
        model.zero_grad()
    with measure.PeakMemory() as peak:
        optimizer = updates and updates([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3 if updates else 2):
            model.zero_grad(set_to_none=updates is not None)
            model(**batch).loss.backward()
            if optimizer:
                optimizer.step()
    return peak.bytes


def estimated(index: int) -> Result:
    """The same figure, estimated from a model on the meta device."""
    setting = SETTINGS[index]
    with torch.device("meta"):
        model = setting.model().train()
    batch = setting.inputs(setting.batch, setting.length)
    same = {"optimizer": setting.optimizer, "set_to_none": setting.optimizer is not None}
    found = tokenseek_fx.estimate(model, batch, options=setting.options, plain=setting.options is None, **same)
    step = found.step if setting.options is not None else found.plain
    there = found.parameters + found.inputs + (0 if found.set_to_none else found.gradients)
    phases = {name: size - there for name, size in found.phases(step).items()}
    return {"estimated": max(phases.values()), "phases": phases, "saved": step.saved}


def own_process(function: Callable[[int], Any], index: int) -> Any:
    """Call the function in a new process, forked after all imports and before any computation."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, (index,))


def result(index: int) -> Result:
    setting = str(SETTINGS[index])
    found = {"setting": setting, **own_process(estimated, index)}
    console.print(f"{setting}: estimated {found['estimated'] / 1e6:.1f} MB,", end=" ", highlight=False)
    found["measured"] = own_process(measured, index)
    found["error"] = found["estimated"] / found["measured"] - 1
    console.print(f"measured {found['measured'] / 1e6:.1f} MB, {found['error']:+.1%}", highlight=False)
    return found


def markdown(results: list[Result]) -> str:
    head = ["setting", "estimated MB", "measured MB", "error", "the most is held in"]
    return table(head, [_cells(found) for found in results])


def _cells(found: Result) -> list[str]:
    sizes = [f"{found[name] / 1e6:.1f}" for name in ("estimated", "measured")]
    return [found["setting"], *sizes, f"{found['error']:+.1%}", max(found["phases"], key=found["phases"].get)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(SETTINGS)), help="numbers of settings, from 0")
    parser.add_argument("--out", type=Path, default=Path("out/bench/estimate.json"))
    options = parser.parse_args()
    if not EXACT_MEMORY.items() <= os.environ.items():  # the allocator reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | EXACT_MEMORY)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    known = {found["setting"] for found in results}
    for index in (i for i in options.only if str(SETTINGS[i]) not in known):
        results.append(result(index))
        figures = {"machine": machine(), "results": results}
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(results) + "\n")
    return int(any(abs(found["error"]) > ALLOWED for found in results))


if __name__ == "__main__":
    sys.exit(main())
