"""Tiny real transformers decoders for the tests: random weights, no dropout, no cache, no download.

No dim equals one of the test lengths 11, 13, 17, 19, 23, so that a dim of such a size is a token axis.
"""

from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, POSITIONS, LORA_RANK = 32, 4, 2, 8, 48, 64, 6
SLIDING_WINDOW = 5
IGNORED = -100

_COMMON = {"hidden_size": HIDDEN, "intermediate_size": INNER, "max_position_embeddings": POSITIONS}
_GROUPED = {**_COMMON, "num_key_value_heads": KV_HEADS}
_NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}

# name -> (model class, configuration class, its settings)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": SLIDING_WINDOW}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": HIDDEN, "n_inner": INNER, "n_positions": POSITIONS,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_COMMON, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": SLIDING_WINDOW},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": HIDDEN, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN,
            "max_position_embeddings": POSITIONS, "dropout": 0.0, "attention_dropout": 0.0,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**_GROUPED, "partial_rotary_factor": 0.5}),
}  # fmt: skip
NAMES = tuple(_FAMILIES)
EAGER_ONLY = {"gemma2"}  # transformers refuses sdpa where scores are soft-capped


def build(
    name: str,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    vocab: int = 97,
    layers: int = 2,
    seed: int = 0,
) -> nn.Module:
    """A random `name` (one of `NAMES`) causal language model in training mode.

    4 heads (2 key/value heads where the family has grouped queries), `attn` one of "sdpa" and "eager" (always
    "eager" for `EAGER_ONLY`). The same arguments give the same weights, whatever `attn` is.
    """
    model_class, config_class, settings = _FAMILIES[name]
    sizes = {"vocab_size": vocab, "num_hidden_layers": layers, "num_attention_heads": HEADS, "use_cache": False}
    config = getattr(transformers, config_class)(**{**_NO_SPECIAL_TOKENS, **sizes, **settings})
    config._attn_implementation = "eager" if name in EAGER_ONLY else attn
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    return with_large_weights(model).to(dtype).train()


def with_large_weights(model: nn.Module) -> nn.Module:
    """`model` with redrawn weights: a scale of 0.02 and biases of 0 would hide most mistakes."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def batch(model: nn.Module, B: int, T: int, padding: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    """A batch for `model`: input_ids and labels int64 [B, T], and with `padding` an attention_mask int64 [B, T].

    Labels are -100 on a prompt at the start of every instance and on padding, which is on the "left" or "right" of
    every instance but the first, and takes a different number of positions in each. Left padding makes transformers'
    own eager attention NaN in float64 (its softmax is float32, where the float64 minimum is -inf, and a padded row has
    nothing else): build with float32 or sdpa there.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.config.vocab_size, (B, T), generator=generator)
    padded = torch.tensor([b % max(1, T // 2) for b in range(B)]) if padding else torch.zeros(B, dtype=torch.int64)
    first = padded if padding == "left" else torch.zeros_like(padded)
    position = torch.arange(T).expand(B, T) - first[:, None]
    real = (position >= 0) & (position < T - padded[:, None])
    prompt = torch.tensor([1 + b % 3 for b in range(B)])[:, None]
    inputs = {"input_ids": torch.where(real, ids, 0), "labels": torch.where(real & (position >= prompt), ids, IGNORED)}
    if padding:
        inputs["attention_mask"] = real.long()
    return inputs


def lora(model: nn.Module, rank: int = LORA_RANK) -> PeftModel:
    """`model` frozen, with trainable low-rank adapters (both factors nonzero) on every linear of its blocks."""
    conv1d = transformers.pytorch_utils.Conv1D
    head = model.get_output_embeddings()
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | conv1d) and m is not head]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[name for name, _ in linears],
        fan_in_fan_out=any(isinstance(m, conv1d) for _, m in linears),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
