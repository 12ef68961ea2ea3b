"""Watch a run while it trains: record it for the report, show progress, and stop it on a signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..integrations.trainer import PREFIX, TokenSeekCallback
from ..recording import Selection
from ..report import Example, Run, Step

_MIB = 2**20
_BINS = 20  # bins of relative positions
_TIMES, _SEQUENCES = 8, 2  # examples are recorded this many times in a run, and this many at a time
_NAME = 48  # the first characters of a sequence are its name
_FIELDS = ("scores", "attention", "gradient", "loss", "labelled")


class Seen:
    """Builds a ``Run`` from the batches and the selections of its steps; ``save`` writes it."""

    def __init__(self, run: Run, directory: Path, tokenizer: Any, total: int) -> None:
        self.run, self.directory, self.tokenizer = run, directory, tokenizer
        self.every = max(1, total // _TIMES)
        self.step, self.counts = 0, torch.zeros(_BINS)
        self.visits: dict[int, Tensor] = {}
        self.overlaps: list[float] = []

    def forward(self, inputs: dict[str, Tensor], selection: Selection | None) -> None:
        """Record a batch (``input_ids``, ``attention_mask``: [B, T]) and its selection. None: all tokens were kept."""
        if selection is None:
            return
        lengths = inputs["attention_mask"].sum(1).tolist()
        ids, kept = inputs["input_ids"].cpu(), selection.indices.cpu()
        for row, length in enumerate(lengths):
            mine = kept[row][kept[row] < length]
            self.counts += torch.bincount(mine * _BINS // length, minlength=_BINS)
            self._visit(hash(tuple(ids[row, :length].tolist())), mine)
        if self.step % self.every == 0 and not any(each.step == self.step + 1 for each in self.run.examples):
            self.run.examples += [
                self._example(ids[row, : lengths[row]], row, selection) for row in range(min(_SEQUENCES, len(lengths)))
            ]

    def _visit(self, name: int, kept: Tensor) -> None:
        if name in self.visits:
            before, now = set(self.visits[name].tolist()), set(kept.tolist())
            self.overlaps.append(len(before & now) / (len(before | now) or 1))
        self.visits[name] = kept.int()

    def _example(self, ids: Tensor, row: int, selection: Selection) -> Example:
        length = len(ids)
        found = {name: getattr(selection, name) for name in _FIELDS}
        known = {name: x[row, :length].tolist() for name, x in found.items() if x is not None}
        tokens = [self.tokenizer.decode([each]) for each in ids.tolist()]
        kept = [i for i in selection.indices[row].tolist() if i < length]
        return Example(self.step + 1, "".join(tokens)[:_NAME], tokens, kept, **known)

    def logged(self, step: int, logs: dict[str, Any], seconds: float | None) -> None:
        """Record the figures of the steps since the last log; ``seconds``: of one step."""
        overlap = sum(self.overlaps) / len(self.overlaps) if self.overlaps else None
        self.overlaps = []
        peak = logs.get(f"{PREFIX}peak_mib")
        self.run.steps.append(
            Step(
                step,
                loss=logs.get("loss"),
                seconds=seconds,
                kept=logs.get(f"{PREFIX}kept"),
                labelled=logs.get(f"{PREFIX}kept_labelled"),
                peak=None if peak is None else int(peak * _MIB),
                overlap=overlap,
            )
        )

    def save(self) -> Run:
        """Write the run as recorded so far, and return it."""
        if total := float(self.counts.sum()):
            self.run.positions = [float(each) / total for each in self.counts]
        self.run.save(self.directory)
        return self.run


class Watch(TrainerCallback):
    """Shows progress, records the run, and stops it with a checkpoint after ``stop`` was called."""

    def __init__(self, seen: Seen, stop: Stop, console: Console) -> None:
        self.seen, self.stop, self.times = seen, stop, list[float]()
        self.compiled = False  # the first step compiles and isn't timed
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        note = TextColumn("{task.fields[note]}")
        self.progress = Progress(*columns, TimeRemainingColumn(), note, console=console)
        self.task = self.progress.add_task("training", total=None, note="compiling")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seen.step = state.global_step
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.compiled:
            self.times.append(time.perf_counter() - self.start)
        self.compiled, self.seen.step = True, state.global_step
        self.progress.update(self.task, completed=state.global_step)
        if self.stop.asked:
            control.should_save = control.should_training_stop = control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "loss" in logs:
            seconds = sorted(self.times)[len(self.times) // 2] if self.times else None
            self.times = []
            self.seen.logged(state.global_step, logs, seconds)
            self.progress.update(self.task, note=_note(logs, seconds))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seen.save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.stop()


def _note(logs: dict[str, Any], seconds: float | None) -> str:
    kept = f", kept {logs[PREFIX + 'kept']:.0%}" if PREFIX + "kept" in logs else ""
    return f"loss {logs['loss']:.3f}{kept}" + (f", {seconds:.2f} s/step" if seconds else "")


class SeeingTrainer(Trainer):
    """A Trainer that passes each batch and its selection to ``seen``."""

    def __init__(self, *args: Any, seen: Seen, chosen: TokenSeekCallback, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen, self.chosen = seen, chosen

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.seen.forward(inputs, self.chosen.selection)
        return loss


class Stop:
    """A signal handler. ``asked``: the number of the first signal, 0 before it. A second signal stops at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked, self.say = 0, say

    def __call__(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        self.say("Saving a checkpoint after this step, then stopping. Repeat the signal to stop at once.")


@contextmanager
def stopping(stop: Stop, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """Handle these signals by ``stop`` inside the context; restore the handlers after it."""
    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def resumed(run: Run, step: int) -> Run:
    """The run up to ``step``, the step of its checkpoint: later steps will be repeated."""
    steps = [each for each in run.steps if each.step <= step]
    return replace(run, steps=steps, examples=[each for each in run.examples if each.step <= step])
