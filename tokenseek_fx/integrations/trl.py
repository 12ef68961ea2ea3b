"""TRL: its trainers ask the model for log-probabilities by a head of their own, which is switched off while the model is trained.

That head (``fused_lm_head=True``) picks rows by data and is a custom autograd function: Dynamo splits the model there, or its
backward runs over all tokens. Here the model's own head is traced instead, and what TRL reads is made of its logits. They exist
for a chunk of tokens at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..warnings import TokenSeekWarning

IGNORED = -100
ASKED = "fused_lm_head"


def has_fused_head(model: nn.Module) -> bool:
    """True for a model that a trainer of TRL gave its head."""
    forwards = (vars(module).get(name) for module in model.modules() for name in ("forward", "_original_forward"))
    codes = (getattr(getattr(forward, "__func__", None), "__code__", None) for forward in forwards)
    return any(code is not None and ASKED in code.co_varnames for code in codes)


class PlainHead:
    """What ``model(...)`` runs while a trainer of TRL trains it: forwards with gradient compiled with the model's own head.

    ``summed``: the trainer adds up all log-probabilities with one factor (SFT). That is a loss inside the model, which tokens can be
    scored and drawn by. Else (DPO) it does with them what it likes, and they carry gradient in the kept rows.

    Raises:
        ConfigError: the model returns an auxiliary loss beside.
    """

    def __init__(self, model: nn.Module, backend: Any, summed: bool) -> None:
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            raise ConfigError(
                "TRL adds the auxiliary loss of the experts outside of the model. Set router_aux_loss_coef=0.0."
            )
        self.plain = model._call_impl
        self.compiled = torch.compile(_traced(self.plain, summed), backend=backend)
        self.without = torch.compile(self.plain, backend=backend)
        _say(summed)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs, **({ASKED: True} if fused_lm_head else {}))
        if not fused_lm_head:
            return self.without(*args, **kwargs)
        loss, told = self.compiled(*args, **kwargs)
        if loss is not None:
            mask = told["label_mask"]
            told["log_probs"] = _SumOf.apply(told["log_probs"], mask, loss * mask.sum())
        return FusedCausalLMOutput(**told)


def _traced(forward: Callable[..., Any], summed: bool) -> Callable[..., tuple[Tensor | None, dict[str, Tensor]]]:
    """A forward of the loss (``summed``), a mean over labelled tokens, and of what TRL reads."""

    def traced(*args: Any, labels: Tensor, **kwargs: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
        output = forward(*args, **kwargs, **({"labels": labels} if summed else {}))
        with torch.set_grad_enabled(not summed):
            return output.loss if summed else None, told_of(output.logits, labels)

    return traced


def told_of(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of every token that has a next one, float [B, T - 1] and 0 where that has no label: ``log_probs`` of it, ``entropy``,
    ``is_top1`` and ``label_mask`` (bool). ``logits``: [B, T, V]."""
    labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    mask, logits = labels != IGNORED, logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    with torch.no_grad():
        scores = logits.log_softmax(-1)
        entropy = -(scores.exp() * scores).sum(-1).masked_fill(~mask, 0)
        top = (scores.argmax(-1) == labels) & mask
    told = {"log_probs": -losses.view_as(labels), "entropy": entropy, "is_top1": top, "label_mask": mask}
    return {name: x[:, :-1] for name, x in told.items()}


def _say(summed: bool) -> None:
    outside = (
        " The trainer computes its loss outside of it: tokens that have no label teach nothing there, keep the others first "
        '(scorer="random", labelled_first=1.0).'
    )
    warnings.warn(
        "tokenseek: TRL's fused head is off in training forwards: it picks tokens by data, which no graph can hold. The model's own "
        f"head is used, for a chunk of tokens at a time.{'' if summed else outside}",
        TokenSeekWarning,
        stacklevel=2,
    )


class _SumOf(torch.autograd.Function):
    """``log_probs`` [B, T - 1], whose sum has the gradient of ``-total``."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, mask: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return log_probs.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        (mask,) = ctx.saved_tensors
        factor = grads[0].masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
        return None, None, -factor
