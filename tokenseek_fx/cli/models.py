"""Load models by path or hub id: with their weights, with random ones, or without any (on the meta device)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .answer import Failure, Usage

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


@dataclass(frozen=True)
class Adapter:
    """LoRA. ``targets``: names of linear layers, or ("all-linear",). ``quantised``: the base has 4 bits (QLoRA)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    quantised: bool = False


def config_of(model: str) -> Any:
    """The configuration of a model.

    Raises:
        Failure: the path has none, or the hub can't be reached.
    """
    transformers = library("transformers")
    with _told("", model):
        return transformers.AutoConfig.from_pretrained(checked(model))


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model.

    Raises:
        Failure: the path has none, or the hub can't be reached.
    """
    transformers = library("transformers")
    with _told("the tokenizer of ", model):
        return transformers.AutoTokenizer.from_pretrained(checked(model))


def without_weights(model: str, adapter: Adapter | None = None) -> nn.Module:
    """The model on the meta device, in training mode."""
    config = config_of(model)
    with torch.device("meta"):
        return _ready(adapted(_causal().from_config(config), adapter))


def with_weights(model: str, dtype: torch.dtype, device: str, adapter: Adapter | None, random: bool) -> nn.Module:
    """The model with its weights, or random ones, on ``device``, in training mode.

    Raises:
        Failure: there are no weights and ``random`` is off, or the hub can't be reached.
    """
    if random:
        made = _causal().from_config(config_of(model), dtype=dtype).to(device)
    else:
        made = _loaded(model, dtype, device, adapter)
    return _ready(adapted(made, adapter))


def _loaded(model: str, dtype: torch.dtype, device: str, adapter: Adapter | None) -> Any:
    if Path(model).is_dir() and not any(next(Path(model).glob(each), None) for each in _WEIGHTS):
        raise Failure(f"{model} has a configuration, but no weights. Start from random ones with --random-weights.")
    with _told("", model):
        if adapter and adapter.quantised:
            return _causal().from_pretrained(checked(model), dtype=dtype, **_quantised(dtype, device))
        return _causal().from_pretrained(checked(model), dtype=dtype).to(device)


def _quantised(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for 4-bit weights, which are put on their device while they load."""
    library("bitsandbytes")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": library("transformers").BitsAndBytesConfig(**settings), "device_map": {"": device}}


def adapted(model: Any, adapter: Adapter | None) -> Any:
    """The model with LoRA adapters; all other parameters are frozen.

    Raises:
        Usage: a target names no layer.
    """
    if adapter is None:
        return model
    peft = library("peft")
    targets = "all-linear" if adapter.targets == ("all-linear",) else list(adapter.targets)
    settings = {"r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout}
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **settings))
    except ValueError as error:  # a target doesn't exist
        raise Usage(f"--lora-targets {','.join(adapter.targets)}: {error}") from None


def _ready(model: Any) -> nn.Module:
    model.config.use_cache = False
    for each in model.modules():
        if hasattr(each, "support_avx512bf16_for_cpu"):  # evaluation would make bitsandbytes repack 4-bit weights in
            each.support_avx512bf16_for_cpu = False  # place, for a matmul that gives no gradient in later training
    return model.train()


def _causal() -> Any:
    return library("transformers").AutoModelForCausalLM


def library(name: str) -> Any:
    """Import an optional library.

    Raises:
        Failure: it can't be imported; the message names the pip command.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "pip install bitsandbytes" if name == "bitsandbytes" else "pip install 'tokenseek-fx[hf]'"
        raise Failure(f"This needs {name}, which can't be imported ({error}): {extra}") from None


def checked(model: str) -> str:
    """The path of a model's directory, or a hub id.

    Raises:
        Failure: it looks like a path, but doesn't exist or has no configuration.
    """
    path = Path(model).expanduser()
    if path.name == "config.json":
        path = path.parent
    if path.is_dir():
        if not (path / "config.json").exists():
            raise Failure(f"{model} is not a model: the directory has no config.json.")
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise Failure(f"{model}: no such directory.")
    return model


@contextmanager
def _told(what: str, model: str) -> Iterator[None]:
    """Turn errors of loading into a ``Failure`` of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        here = (
            ""
            if Path(model).exists()
            else " There is no such directory here: check the hub id and the connection to the hub."
        )
        raise Failure(f"{what}{model} can't be loaded: {first}{here}") from None


def device_and_dtype(dtype: str, adapter: Adapter | None) -> tuple[str, torch.dtype, bool]:
    """Device, dtype of the weights, and whether autocast to bfloat16 is on.

    ``dtype`` "auto" is float32 on the CPU; on a GPU with bfloat16 it is bfloat16 for the frozen base of an adapter, and
    otherwise float32 under autocast.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        on_gpu = device == "cuda" and torch.cuda.is_bf16_supported()
        dtype = ("bfloat16" if adapter else "mixed") if on_gpu else "float32"
    return device, torch.bfloat16 if dtype == "bfloat16" else torch.float32, dtype == "mixed"


def adapter_of(lora: bool, qlora: bool, rank: int, alpha: int | None, dropout: float, targets: str) -> Adapter | None:
    """The adapter that the options of the command line describe; None for full training."""
    if not (lora or qlora):
        return None
    names = tuple(name.strip() for name in targets.split(","))
    return Adapter(rank, alpha or 2 * rank, dropout, names, qlora)


def batch_for(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    """Random token ids, labels and a mask of ones, int64 [batch, length], on the model's device."""
    vocabulary, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.randint(vocabulary, (batch, length), device=device)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def longest(model: str) -> int | None:
    """The number of positions of the model; None if its configuration doesn't give it."""
    return getattr(config_of(model).get_text_config(), "max_position_embeddings", None)


def parameters(model: nn.Module) -> tuple[int, int]:
    """Number of parameters: all, trainable."""
    found: Sequence[Any] = list(model.parameters())
    return sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad)
