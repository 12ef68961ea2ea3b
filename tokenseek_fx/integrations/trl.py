"""TRL: its trainers ask the model for log-probabilities by a head of their own, which is switched off while the model is trained.

That head (``fused_lm_head=True``) picks rows by data and is a custom autograd function: Dynamo splits the model there, or its
backward runs over all tokens. Here the model's own head is traced instead, and what TRL reads is made of its logits.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..warnings import TokenSeekWarning
from .watched import Watched

IGNORED = -100
ASKED = "fused_lm_head"


def fused_head(model: nn.Module) -> Mapping[str, Any] | None:
    """The settings of the head that a trainer of TRL gave a model (``temperature``, ``outputs``); ``None``: it has none."""
    forwards = (vars(module).get(name) for module in model.modules() for name in ("forward", "_original_forward"))
    for forward in forwards:
        function = getattr(forward, "__func__", None)
        if function is not None and ASKED in function.__code__.co_varnames:
            return inspect.getclosurevars(function).nonlocals
    return None


class PlainHead:
    """What ``model(...)`` runs while a trainer of TRL trains it: forwards with gradient compiled with the model's own head.

    ``summed``: the trainer adds up all log-probabilities with one factor (SFT). That is a loss inside the model, which tokens can be
    scored and drawn by. Else (DPO) it does with them what it likes, and they carry gradient in the kept rows.

    Raises:
        ConfigError: the model returns an auxiliary loss beside, or the head divides logits by a temperature.
    """

    def __init__(self, model: nn.Module, head: Mapping[str, Any], backend: Watched, summed: bool) -> None:
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            raise ConfigError(
                "TRL adds the auxiliary loss of the experts outside of the model. Set router_aux_loss_coef=0.0."
            )
        if head["temperature"] != 1:
            raise ConfigError(
                f"TRL's head divides logits by {head['temperature']}, the model's own does not. Set temperature=1.0."
            )
        self.plain = model._call_impl
        self.told = not summed or backend.config.logits == "keep"
        self.compiled = torch.compile(
            _traced(self.plain, summed, head["outputs"] if self.told else None), backend=backend
        )
        self.without = torch.compile(self.plain, backend=backend)
        _say(summed)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs, **({ASKED: True} if fused_lm_head else {}))
        if not fused_lm_head:
            return self.without(*args, **kwargs)
        loss, told = self.compiled(*args, **kwargs)
        if not self.told:
            told = unknown(loss, kwargs["labels"])
        if loss is not None:
            mask = told["label_mask"]
            told["log_probs"] = _SumOf.apply(told["log_probs"], mask, loss * mask.sum())
        return FusedCausalLMOutput(**told)


def _traced(
    forward: Callable[..., Any], summed: bool, asked: Collection[str] | None
) -> Callable[..., tuple[Tensor | None, dict[str, Tensor]]]:
    """A forward of the loss (``summed``), a mean over labelled tokens, and of what TRL reads (``asked``; ``None``: nothing)."""

    def traced(*args: Any, labels: Tensor, **kwargs: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
        output = forward(*args, **kwargs, **({"labels": labels} if summed else {}))
        with torch.set_grad_enabled(not summed):
            return output.loss if summed else None, {} if asked is None else selections_of(output.logits, labels, asked)

    return traced


def unknown(loss: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``selections_of`` without logits: every labelled token has the mean log-probability; entropy and accuracy are NaN, not a number that
    would be wrong."""
    mask = labels[:, 1:] != IGNORED
    nan = torch.full(mask.shape, torch.nan, device=mask.device)
    return {"log_probs": -loss.detach() * mask, "entropy": nan, "is_top1": nan, "label_mask": mask}


def selections_of(logits: Tensor, labels: Tensor, asked: Collection[str]) -> dict[str, Tensor]:
    """Of every token that has a next one, [B, T - 1] and 0 where that has no label: its ``log_probs``, ``label_mask``, and of the other
    fields of TRL's ``FusedCausalLMOutput`` those ``asked`` for. ``logits``: [B, T, V]."""
    labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    mask, logits = labels != IGNORED, logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    told = {"log_probs": -losses.view_as(labels), "label_mask": mask}
    with torch.no_grad():
        scores = logits.log_softmax(-1)
        others = {
            "entropy": lambda: -(scores.exp() * scores).sum(-1),
            "log_sum_sq_probs": lambda: (2 * scores).logsumexp(-1),
            "mean_logits": lambda: logits.mean(-1),
            "is_top1": lambda: scores.argmax(-1) == labels,
        }
        told |= {name: value().masked_fill(~mask, 0) for name, value in others.items() if name in asked}
    return {name: x[:, :-1] for name, x in told.items()}


def _say(summed: bool) -> None:
    metrics = ' For entropy and accuracy it makes the logits of all tokens; logits="drop" does without them.'
    outside = (
        " The trainer computes its loss outside of it: tokens that have no label teach nothing there, keep the others first "
        '(scorer="random", labelled_first=1.0).'
    )
    warnings.warn(
        "tokenseek: TRL's fused head is off in training forwards: it picks tokens by data, which no graph can hold. The model's own "
        f"head is used.{metrics if summed else outside}",
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
