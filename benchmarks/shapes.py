"""The models of the benchmarks: shapes, and settings (a shape, a batch, the trained parameters, a device)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; weights are random."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def config(self, length: int) -> LlamaConfig:
        """The configuration for sequences of `length` tokens."""
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.mlp, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        rest = {"vocab_size": self.vocab, "tie_word_embeddings": self.tied, "max_position_embeddings": length}
        return LlamaConfig(**sizes, **heads, **rest, use_cache=False)

    def __str__(self) -> str:
        heads = f"{self.heads} heads, {self.kv_heads} key/value heads, vocabulary {self.vocab}"
        return f"{self.layers} layers, hidden {self.hidden}, MLP {self.mlp}, {heads}{', tied' * self.tied}"


SHAPES = {
    "quick": Shape(hidden=64, mlp=96, layers=2, heads=4, kv_heads=2, vocab=256),
    "small": Shape(hidden=512, mlp=1536, layers=8, heads=8, kv_heads=2, vocab=4096),
    "small, V=32000": Shape(hidden=512, mlp=1536, layers=8, heads=8, kv_heads=2, vocab=32000),
    "1B": Shape(hidden=2048, mlp=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True),
    "3B": Shape(hidden=3072, mlp=8192, layers=28, heads=24, kv_heads=8, vocab=128256, tied=True),
    "8B": Shape(hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
}
"""1B, 3B, 8B: Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B, from their published config.json."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One model and one batch: `shape` names one of `SHAPES`, `training` is "full", "lora" or "qlora" (LoRA on NF4)."""

    shape: str
    length: int
    batch: int
    training: str = "full"
    keep_ratio: float = 0.1
    device: str = "cpu"
    dtype: str = "float32"

    def model(self) -> nn.Module:
        """The model with random weights, the same for all rows."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.dtype])
        with torch.device(self.device):
            model = LlamaForCausalLM(SHAPES[self.shape].config(self.length))
        torch.set_default_dtype(before)
        return self.adapted(model).train()

    def adapted(self, model: LlamaForCausalLM) -> nn.Module:
        """The model prepared for training all parameters, or adapters on all linear layers of the blocks."""
        if self.training == "full":
            return model
        if self.training == "qlora":
            quantise(model, self.device)
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Random ids and labels, int64 [batch, length]; all tokens are labelled."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(SHAPES[self.shape].vocab, (self.batch, self.length), generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids.clone()}

    def __str__(self) -> str:
        training = {"full": "", "lora": ", LoRA", "qlora": ", LoRA on a 4-bit base"}[self.training]
        ratio = f", r={self.keep_ratio}" * (self.keep_ratio != 0.1)
        where = f", {self.dtype}, {self.device}" * (self.device != "cpu")
        return f"{self.shape}, T={self.length} B={self.batch}{training}{ratio}{where}"


def quantise(model: nn.Module, device: str) -> None:
    """Quantise all linear layers of the blocks to NF4, in place."""
    import bitsandbytes

    model.requires_grad_(False)
    for name, linear in [(n, m) for n, m in model.model.named_modules() if isinstance(m, nn.Linear)]:
        compute = linear.weight.dtype
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=compute
        )
        packed.load_state_dict(linear.state_dict())
        model.model.set_submodule(name, packed.to(device))
