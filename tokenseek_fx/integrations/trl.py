"""TRL's trainers: their fused head, which computes log-probabilities, is replaced during training.

The fused head (``fused_lm_head=True``) selects rows depending on data and is a custom autograd function: Dynamo splits
the model there, or its backward runs over all tokens. Here the model's own head is traced instead, and the outputs that
TRL reads are computed from its logits.
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
    """The settings (``temperature``, ``outputs``) of the fused head that TRL added to the model; None without one."""
    forwards = (vars(module).get(name) for module in model.modules() for name in ("forward", "_original_forward"))
    for forward in forwards:
        function = getattr(forward, "__func__", None)
        if function is not None and ASKED in function.__code__.co_varnames:
            return inspect.getclosurevars(function).nonlocals
    return None


class PlainHead:
    """Replaces ``model(...)`` while TRL trains it: compiles forwards with gradient, with the model's own head.

    ``summed``: the trainer sums all log-probabilities with one factor (SFT). That is a loss inside the model, by which
    tokens can be scored and drawn. Otherwise (DPO) the trainer uses the log-probabilities in any way, and those of the
    kept rows carry gradient.

    Raises:
        ConfigError: the model returns an auxiliary loss, or the fused head divides logits by a temperature.
    """

    def __init__(self, model: nn.Module, head: Mapping[str, Any], backend: Watched, summed: bool) -> None:
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            raise ConfigError(
                "TRL adds the auxiliary loss of the experts outside the model. Set router_aux_loss_coef=0.0."
            )
        if head["temperature"] != 1:
            raise ConfigError(
                f"TRL's head divides logits by {head['temperature']}, the model's own doesn't. Set temperature=1.0."
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
    """A forward that returns (the mean loss over labelled tokens if ``summed``, the outputs ``asked`` for by TRL).

    ``asked`` None: without such outputs.
    """

    def traced(*args: Any, labels: Tensor, **kwargs: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
        output = forward(*args, **kwargs, **({"labels": labels} if summed else {}))
        with torch.set_grad_enabled(not summed):
            return output.loss if summed else None, {} if asked is None else selections_of(output.logits, labels, asked)

    return traced


def unknown(loss: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``selections_of`` without logits, [B, T - 1]: each labelled token gets the mean log-probability.

    Entropy and accuracy are NaN, so that no wrong number is logged.
    """
    mask = labels[:, 1:] != IGNORED
    nan = torch.full(mask.shape, torch.nan, device=mask.device)
    return {"log_probs": -loss.detach() * mask, "entropy": nan, "is_top1": nan, "label_mask": mask}


def selections_of(logits: Tensor, labels: Tensor, asked: Collection[str]) -> dict[str, Tensor]:
    """The fields of TRL's ``FusedCausalLMOutput``, each [B, T - 1]: one value for each token that predicts a next one.

    ``log_probs`` (float32), ``label_mask`` (bool) and those of the others that ``asked`` names; values are 0 if the
    next token has no label. ``logits``: [B, T, V]. ``labels``: int64 [B, T].
    """
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
    metrics = ' Entropy and accuracy need the logits of all tokens; set logits="drop" to do without both.'
    outside = (
        " The trainer computes its loss outside the model, where tokens without a label have no effect. Keep labelled "
        'tokens first (scorer="random", labelled_first=1.0).'
    )
    warnings.warn(
        "tokenseek: TRL's fused head is off in training forwards: its choice of tokens depends on data and can't be "
        f"traced. The model's own head is used.{metrics if summed else outside}",
        TokenSeekWarning,
        stacklevel=2,
    )


class _SumOf(torch.autograd.Function):
    """``log_probs`` [B, T - 1] with a backward in which their sum has the gradient of ``-total``."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, mask: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return log_probs.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        (mask,) = ctx.saved_tensors
        factor = grads[0].masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
        return None, None, -factor
