"""The rows of the benchmarks, which prepare a model for training: plain PyTorch, its ways to save memory, tokenseek.

Exact rows have the loss and the gradient of all tokens; tokenseek's gradient is that of the kept tokens
(docs/definition.md).
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as recompute
from training import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from tokenseek_fx import Config, backend

Make = Callable[[nn.Module, float], nn.Module]
"""(model, keep_ratio) -> the module to train; exact rows ignore the ratio."""

CHUNK = 512  # tokens whose logits exist at a time, if PyTorch has no chunked loss


class ChunkedHead(nn.Module):
    """A model with head and loss computed in chunks of tokens; it returns no logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        """The next-token loss of a transformers model; ``input_ids`` and ``labels``: int64 [B, T]."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = causal.model(input_ids=input_ids)[0]
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        return CausalLMOutput(loss=chunked_loss(hidden.flatten(0, 1), causal.lm_head.weight, shifted.flatten()))


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T`: PyTorch's own from 2.13 on, before that ``recomputed_loss``."""
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())
    return recomputed_loss(hidden, weight, labels)


def recomputed_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same from checkpointed chunks, which Dynamo can trace, for PyTorch before 2.13."""
    parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    total = sum(recompute.checkpoint(loss_of, rows, weight, y, use_reentrant=False) for rows, y in parts)
    return total / (labels != -100).sum()


def loss_of(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss summed over the labelled rows, in float32."""
    return F.cross_entropy(F.linear(rows, weight).float(), labels, reduction="sum")


def plain(model: nn.Module, ratio: float) -> nn.Module:
    return model


def checkpointed(model: nn.Module, ratio: float) -> nn.Module:
    checkpoint(model)
    return model


def checkpointed_and_chunked(model: nn.Module, ratio: float) -> nn.Module:
    return ChunkedHead(checkpointed(model, ratio))


def compiled(model: nn.Module, ratio: float) -> nn.Module:
    model.compile()
    return model


def compiled_and_chunked(model: nn.Module, ratio: float) -> nn.Module:
    return compiled(ChunkedHead(model), ratio)


def budget(share: float) -> Make:
    """torch.compile with a partitioner that saves this fraction of the bytes."""

    def make(model: nn.Module, ratio: float) -> nn.Module:
        torch._functorch.config.activation_memory_budget = share
        return compiled(model, ratio)

    return make


def liger(model: nn.Module, ratio: float) -> nn.Module:
    """Liger's fused kernels and fused head and loss, with gradient checkpointing."""
    if next(model.parameters()).device.type == "cpu":
        raise RuntimeError("Liger's Triton kernels need a GPU")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("liger-kernel is not installed")
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model.get_base_model() if hasattr(model, "get_base_model") else model)
    return checkpointed(model, ratio)


def tokenseek(**options: Any) -> Make:
    """Train on the kept tokens; by default without the logits of all tokens."""

    def make(model: nn.Module, ratio: float) -> nn.Module:
        share = {} if "keep_tokens" in options else {"keep_ratio": ratio}
        config = Config.from_options({"logits": "drop", "strict": True, **share, **options})
        model.compile(backend=backend(config))  # a backend by name would need the package to be installed
        return model

    return make


EAGER, COMPILE, FORWARD = "eager", "torch.compile", "torch.compile, forward alone"
CHECKPOINT, RIVAL = "checkpointing", "checkpointing, chunked loss"
DEFAULT, RANDOM, WHOLE = "tokenseek", "tokenseek, random rows", "tokenseek, random rows, full loss"
SEEK, NONE = "tokenseek, one kept token", "tokenseek, recompute none"
PAPER = {name: value for name, value in vars(Config.paper()).items() if value != getattr(Config(), name)}
PAPER.pop("keep_ratio", None)

ROWS: dict[str, Make] = {
    EAGER: plain,
    CHECKPOINT: checkpointed,
    RIVAL: checkpointed_and_chunked,
    COMPILE: compiled,
    "torch.compile, chunked loss": compiled_and_chunked,
    "torch.compile, memory budget 0.5": budget(0.5),
    "torch.compile, memory budget 0.3": budget(0.3),
    "torch.compile, memory budget 0.1": budget(0.1),
    "Liger, checkpointing": liger,
    FORWARD: compiled,
    DEFAULT: tokenseek(),
    NONE: tokenseek(recompute="none"),
    SEEK: tokenseek(keep_tokens=1),
    "tokenseek, logits keep": tokenseek(logits="keep"),
    "tokenseek, attention": tokenseek(scorer="attention", report_loss="kept"),
    RANDOM: tokenseek(scorer="random", select="topk", report_loss="kept"),
    WHOLE: tokenseek(scorer="random", select="topk", report_loss="full"),
    "tokenseek, the paper's recipe": tokenseek(**PAPER),
}
#: Rows of benchmarks/rounds.py: the share of the tokens, and the rounds that run them.
IN_ROUNDS = [(1, n) for n in (2, 4, 8, 16, 32, 64)] + [(0.4, n) for n in (1, 4, 8)] + [(0.1, n) for n in (1, 4)]


def in_rounds(share: float, rounds: int) -> str:
    """The name of the row that trains on this share of the tokens in rounds."""
    return f"tokenseek, {share:.0%} in {rounds} rounds" if rounds > 1 else f"tokenseek, {share:.0%}"


ROUNDS: dict[str, Make] = {in_rounds(share, n): tokenseek(keep_ratio=share, rounds=n) for share, n in IN_ROUNDS}
EVERY = ROWS | ROUNDS
MAIN = [EAGER, CHECKPOINT, RIVAL, COMPILE, FORWARD, DEFAULT, NONE]
CAVEATS = (
    "activation_memory_budget: its peak is not monotone in the budget (pytorch #197838), and dropout is recomputed "
    "with fresh randomness (#190758). The loss of random rows and of attention is the mean over the kept tokens."
)
