"""transformers' Trainer: compile at the right moment, figures in the logs, nothing else changed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.training_args import ParallelMode

from .. import compat
from ..config import Config, ConfigError
from ..peak import forget_peak
from ..recording import Selection
from ..warnings import TokenSeekWarning
from .trl import PlainHead, fused_head
from .watched import Watched

PREFIX = "tokenseek_"
#: What transformers and PEFT call the hook that makes embeddings require grad.
_INPUT_HOOK = "make_inputs_require_grad"


class TokenSeekCallback(TrainerCallback):
    """Trains the model of a ``Trainer`` on selected tokens: ``Trainer(..., callbacks=[TokenSeekCallback(keep_ratio=0.2)])``.

    Training forwards are compiled in place while the Trainer trains. Evaluation, checkpoints, resuming, accumulation and mixed
    precision are the Trainer's own, without a compiler. Training logs get these figures, of the steps since the last log:
    ``tokenseek_kept``, ``tokenseek_kept_labelled`` (shares of the tokens, of the labelled ones), ``tokenseek_scoring_share`` (of
    the step's matrix products), ``tokenseek_recompiles``, ``tokenseek_activations_mib`` (what one forward saved for backward),
    ``tokenseek_peak_mib`` (the most that was allocated on the device; on the CPU, resident). For the last one the beginning and every
    log reset the peak that PyTorch or Linux counts for the process; elsewhere it is the most so far. With several processes the
    figures are those of the process that logs.

    Args:
        options: fields of ``Config``.

    Raises:
        ConfigError: a bad option; or, when training begins, a model that is compiled already or copied by ``DataParallel``.
    """

    def __init__(self, **options: Any) -> None:
        self.config = Config.from_options(options)
        self.watched = Watched(self.config)
        self.settings = ExitStack()

    @property
    def selection(self) -> Selection | None:
        """That of the last training forward (``None``: it kept all tokens)."""
        return self.watched.selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        _refuse(args, model)
        _go_first(self)
        self.watched = Watched(self.config)
        self.settings.close()  # those of a run that was interrupted
        self.settings.callback(compat.call_in_place, model, None)
        if args.parallel_mode is ParallelMode.DISTRIBUTED:
            self.settings.enter_context(whole_graphs())
        if not _is_reentrant(args):
            self.settings.enter_context(without_input_hooks(model))
        compat.call_in_place(model, _call(args, model, self.watched))
        forget_peak(next(model.parameters()).device)

    def on_step_begin(self, args: TrainingArguments, *others: Any, model: nn.Module, **kwargs: Any) -> None:
        if not _is_reentrant(args):  # DPO's forward of the reference has them put back
            remove_input_hooks(model)

    on_substep_end = on_step_begin

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:  # of evaluation, or the summary at the end
            return
        device = next(model.parameters()).device
        figures = {PREFIX + name: value for name, value in self.watched.figures(device).items()}
        logs.update(figures)
        state.log_history[-1].update(figures)  # a copy, made before callbacks saw the logs

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.settings.close()


class InPlace:
    """What ``model(...)`` runs while it is trained: forwards with gradient compiled, all others as they are."""

    def __init__(self, model: nn.Module, backend: Watched) -> None:
        self.plain = model._call_impl
        self.compiled = torch.compile(self.plain, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.plain)(*args, **kwargs)


def _call(args: TrainingArguments, model: nn.Module, backend: Watched) -> InPlace | PlainHead:
    if (head := fused_head(model)) is not None:
        return PlainHead(model, head, backend, summed=getattr(args, "loss_type", None) == "nll")
    return InPlace(model, backend)


def _is_reentrant(args: TrainingArguments) -> bool:
    given = [getattr(args, f"{kind}_checkpointing_kwargs", None) or {} for kind in ("activation", "gradient")]
    return any(settings.get("use_reentrant") for settings in given)


@contextmanager
def without_input_hooks(model: nn.Module) -> Iterator[None]:
    """Embeddings are not made to require grad: that serves reentrant checkpointing alone, and Dynamo can't trace it."""
    found = remove_input_hooks(model)
    yield
    remove_input_hooks(model)
    for hooks, key, hook in found:
        hooks[key] = hook


def remove_input_hooks(model: nn.Module) -> list[tuple[dict[int, Any], int, Any]]:
    """Several libraries may have asked for these hooks, and transformers knows the last alone: all are found by their name."""
    every = [(module._forward_hooks, *item) for module in model.modules() for item in module._forward_hooks.items()]
    found = [(hooks, key, hook) for hooks, key, hook in every if getattr(hook, "__name__", "").startswith(_INPUT_HOOK)]
    for hooks, key, _ in found:
        del hooks[key]
    return found


def whole_graphs() -> AbstractContextManager:
    """Dynamo leaves graphs under DDP whole (``optimize_ddp``); says so where that changes anything."""
    config = torch._dynamo.config
    if config.optimize_ddp:
        warnings.warn(
            "tokenseek: torch._dynamo.config.optimize_ddp is off while the Trainer trains. It would split the model between the buckets "
            "of DDP, and a part of a model can't choose tokens.",
            TokenSeekWarning,
            stacklevel=2,
        )
    return config.patch(optimize_ddp=False)


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        raise ConfigError(
            f"The Trainer spreads the model over {args.n_gpu} GPUs by DataParallel, which copies it for every step and can't be "
            "compiled. Start one process for each GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES=0."
        )
    if args.torch_compile:
        raise ConfigError(
            "torch_compile=True would compile the model around TokenSeekCallback, which compiles it. Leave it out."
        )
    if not isinstance(compat.called_in_place(model), InPlace | PlainHead | None):
        raise ConfigError(
            "The model is compiled already. Leave out model.compile(...) and give its options to TokenSeekCallback(...)."
        )


def _go_first(callback: TrainerCallback) -> None:
    """Trackers (``report_to``) come before callbacks of the user's: they would not see figures that are added after them.

    transformers gives callbacks nothing of what calls them; it is found on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None and not isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None and callback in handler.callbacks:
        handler.callbacks.remove(callback)  # while the list is walked: those before move up by one, none is left out
        handler.callbacks.insert(0, callback)
