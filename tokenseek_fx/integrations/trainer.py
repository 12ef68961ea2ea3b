"""A callback for transformers' Trainer: compiles the model for training and adds figures to the logs."""

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
#: The name, in transformers and PEFT, of the hook that makes the outputs of embeddings require grad.
_INPUT_HOOK = "make_inputs_require_grad"


class TokenSeekCallback(TrainerCallback):
    """Train a ``Trainer``'s model on selected tokens: ``Trainer(..., callbacks=[TokenSeekCallback(keep_ratio=0.2)])``.

    Training forwards are compiled in place during training. Evaluation, checkpoints, resuming, accumulation and mixed
    precision stay the Trainer's, without a compiler. Training logs get these figures of the steps since the last log:

    - ``tokenseek_kept``, ``tokenseek_kept_labelled``: the kept fraction of the tokens and of the labelled tokens.
    - ``tokenseek_scoring_share``: the fraction of the step's matrix-product FLOPs that chooses the tokens.
    - ``tokenseek_recompiles``: the training graphs after the first.
    - ``tokenseek_activations_mib``: MiB that one forward saved for backward.
    - ``tokenseek_peak_mib``: peak MiB allocated on the device; on the CPU, peak resident memory.

    The start of training and each log reset the peak that PyTorch or Linux keeps for the process; where it can't be
    reset, it is the peak since the process started. With several processes the figures are those of the process that
    logs.

    Args:
        options: fields of ``Config``.

    Raises:
        ConfigError: an option is invalid; or, when training begins, the model is already compiled or is copied by
            ``DataParallel``, ``torch_compile`` is set, or TRL computes its loss in a way that can't be compiled.
    """

    def __init__(self, **options: Any) -> None:
        self.config = Config.from_options(options)
        self.watched = Watched(self.config)
        self.settings = ExitStack()

    @property
    def selection(self) -> Selection | None:
        """The selection of the last training forward. None: it kept all tokens."""
        return self.watched.selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        _refuse(args, model)
        _go_first(self)
        self.watched = Watched(self.config)
        self.settings.close()  # of an interrupted run
        self.settings.callback(compat.call_in_place, model, None)
        if args.parallel_mode is ParallelMode.DISTRIBUTED:
            self.settings.enter_context(whole_graphs())
        if not _is_reentrant(args):
            self.settings.enter_context(without_input_hooks(model))
        compat.call_in_place(model, _call(args, model, self.watched))
        forget_peak(next(model.parameters()).device)

    def on_step_begin(self, args: TrainingArguments, *others: Any, model: nn.Module, **kwargs: Any) -> None:
        if not _is_reentrant(args):  # DPO's forward of the reference model adds them again
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
        if "loss" not in logs:  # logs of an evaluation, or the final summary
            return
        device = next(model.parameters()).device
        figures = {PREFIX + name: value for name, value in self.watched.figures(device).items()}
        logs.update(figures)
        state.log_history[-1].update(figures)  # a copy of the logs that was made before callbacks ran

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.settings.close()


class InPlace:
    """Replaces ``model(...)`` during training: compiles forwards with gradient and runs all others as they are."""

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
    """Remove the hooks that make embeddings require grad, and restore them on exit.

    Only reentrant checkpointing needs these hooks, and Dynamo can't trace them.
    """
    found = remove_input_hooks(model)
    yield
    remove_input_hooks(model)
    for hooks, key, hook in found:
        hooks[key] = hook


def remove_input_hooks(model: nn.Module) -> list[tuple[dict[int, Any], int, Any]]:
    """Remove the hooks that make embeddings require grad. Return, for each, (the module's hooks, its key, the hook).

    They are found by name: several libraries may have added one, and transformers keeps a handle of the last one only.
    """
    every = [(module._forward_hooks, *item) for module in model.modules() for item in module._forward_hooks.items()]
    found = [(hooks, key, hook) for hooks, key, hook in every if getattr(hook, "__name__", "").startswith(_INPUT_HOOK)]
    for hooks, key, _ in found:
        del hooks[key]
    return found


def whole_graphs() -> AbstractContextManager:
    """Keep Dynamo from splitting graphs under DDP (``optimize_ddp``), and warn if that changes the setting."""
    config = torch._dynamo.config
    if config.optimize_ddp:
        warnings.warn(
            "tokenseek: torch._dynamo.config.optimize_ddp is switched off during training. It would split the model at "
            "DDP's gradient buckets, and a fragment of a model can't select tokens.",
            TokenSeekWarning,
            stacklevel=2,
        )
    return config.patch(optimize_ddp=False)


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        raise ConfigError(
            f"The Trainer runs the model on {args.n_gpu} GPUs with DataParallel, which copies it in every step and "
            "can't be compiled. Start one process for each GPU (torchrun, accelerate launch), or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if args.torch_compile:
        raise ConfigError(
            "torch_compile=True would compile the model again, around TokenSeekCallback. Remove torch_compile."
        )
    if not isinstance(compat.called_in_place(model), InPlace | PlainHead | None):
        raise ConfigError(
            "The model is already compiled. Remove model.compile(...) and pass its options to TokenSeekCallback(...)."
        )


def _go_first(callback: TrainerCallback) -> None:
    """Move the callback before the trackers (``report_to``), which otherwise run first and miss the figures added here.

    transformers doesn't pass callbacks their handler, so it is found on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None and not isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None and callback in handler.callbacks:
        handler.callbacks.remove(callback)  # during iteration: callbacks before it move up by one, so none is skipped
        handler.callbacks.insert(0, callback)
