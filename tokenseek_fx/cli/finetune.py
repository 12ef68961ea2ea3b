"""Finetune: train a model on data; write the weights and a report, and print a table."""

from __future__ import annotations

import json
import math
import random
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..explanation import Explanation
from ..integrations.trainer import TokenSeekCallback
from ..report import Run, Step, memory_of, write_report
from . import models
from .answer import Answer, Failure, Interrupted, Usage, progress_console
from .data import rows, write_bad
from .encode import Sequences, batch_of, sequences
from .predict import explain_without_weights
from .watch import SeeingTrainer, Seen, Stop, Watch, resumed, stopping

_SETTINGS, _BAD, _REPORT, _MODEL = "settings.json", "skipped.jsonl", "report.html", "model"
_MISSING = "not in this report"
_COMPARED, _COMPILER = "all-tokens", ("inner", "mode", "inductor_options")
_LOGS = 500  # points of a curve, approximately


@dataclass(frozen=True)
class Settings:
    """All that determines a run. A run resumes only with the settings that it began with."""

    model: str
    data: str
    split: str
    subset: str | None
    columns: str | None
    tokenizer: str | None
    chat_template: str | None
    length: int
    held_out: int | None
    epochs: float
    steps: int
    batch: int
    accumulate: int
    lr: float | None
    warmup: float
    dtype: str
    seed: int
    random_weights: bool
    skip_bad: bool
    adapter: models.Adapter | None
    options: dict[str, Any]

    @property
    def rate(self) -> float:
        return self.lr or (2e-4 if self.adapter else 2e-5)


@dataclass(frozen=True)
class Work:
    """All that a run needs, before it begins: ``learnt`` are the training sequences."""

    settings: Settings
    out: Path
    data: Sequences
    learnt: list[dict[str, list[int]]]
    held_out: list[dict[str, list[int]]]
    tokenizer: Any
    model: nn.Module
    trainer: SeeingTrainer
    watch: Watch
    console: Console


def finetune(settings: Settings, out: Path, save_every: int, resume: bool, compare: bool) -> Answer:
    """Train, save the model and write the report; with ``compare``, train on all tokens too.

    Raises:
        Failure: data, model or checkpoint can't be loaded.
        Usage: ``out`` holds a run and ``resume`` is off, or ``resume`` is on and the settings differ.
        Interrupted: a signal stopped training; the message names the checkpoint, if one was saved.
    """
    checkpoint = begin(settings, out, resume)
    console = progress_console()
    work = prepared(settings, out, save_every, checkpoint, console)
    before = _held_out_loss(work, "before")
    start = time.perf_counter()
    with stopping(work.watch.stop):
        try:
            work.trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            raise _interrupted(work) from None
        finally:
            work.watch.progress.stop()
    if work.watch.stop.asked and not _finished(work):
        raise _interrupted(work)
    return _done(work, before, time.perf_counter() - start, compare)


def begin(settings: Settings, out: Path, resume: bool) -> str | None:
    """The checkpoint to resume from; None for a new run.

    Raises:
        Failure, Usage: as in ``finetune``.
    """
    saved, now = out / _SETTINGS, json.loads(json.dumps(asdict(settings)))
    checkpoint = get_last_checkpoint(str(out)) if saved.exists() else None
    if not resume:
        if checkpoint or (out / _MODEL).exists():
            raise Usage(f"{out} holds a run. Resume it (--resume), or choose another directory (--out).")
        return None
    if checkpoint is None:
        raise Failure(f"{out} holds no checkpoint to resume from. Omit --resume to start a new run.")
    then = json.loads(saved.read_text(encoding="utf-8"))
    if other := [name for name in now if now[name] != then.get(name)]:
        told = ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in other)
        raise Usage(
            f"{out} was started with other settings: {told}. "
            "Use the same settings, or choose another directory (--out)."
        )
    return checkpoint


def prepared(settings: Settings, out: Path, save_every: int | None, checkpoint: str | None, console: Console) -> Work:
    """Read data and model, then write the settings: errors of data and model come before anything is written."""
    tokenizer, length = _tokenizer(settings), _length(settings)
    with console.status("reading the data"):
        found = rows(settings.data, settings.split, settings.subset)
        data = sequences(found, tokenizer, length, settings.columns, settings.data, skip_bad=settings.skip_bad)
    learnt, held_out = split(data.sequences, settings.held_out, settings.seed)
    with console.status("loading the model"):
        model, mixed = _model(settings, tokenizer)
    seen = Seen(_run(settings, length, data, model, out, checkpoint), out, tokenizer, _steps(settings, len(learnt)))
    watch, chosen = Watch(seen, Stop(console.print), console), TokenSeekCallback(**settings.options)
    trainer = SeeingTrainer(
        model=model,
        args=_arguments(settings, out, save_every, len(learnt), mixed),
        data_collator=partial(batch_of, pad=_pad(tokenizer), length=length),
        train_dataset=learnt,  # type: ignore[arg-type] (a list works as a dataset)
        eval_dataset=held_out or None,  # type: ignore[arg-type]
        callbacks=[chosen, watch],
        seen=seen,
        chosen=chosen,
    )
    trainer.remove_callback(PrinterCallback)
    _write_beginning(settings, out, data)
    return Work(settings, out, data, learnt, held_out, tokenizer, model, trainer, watch, console)


def _model(settings: Settings, tokenizer: Any) -> tuple[nn.Module, bool]:
    """The model, and whether autocast is on."""
    torch.manual_seed(settings.seed)
    device, dtype, mixed = models.device_and_dtype(settings.dtype, settings.adapter)
    model = models.with_weights(settings.model, dtype, device, settings.adapter, settings.random_weights)
    has = model.config.get_text_config().vocab_size
    if len(tokenizer) > has:
        raise Failure(
            f"The tokenizer has {len(tokenizer)} tokens, the model {has}. Choose the model's tokenizer (--tokenizer)."
        )
    return model, mixed


def _tokenizer(settings: Settings) -> Any:
    tokenizer = models.tokenizer_of(settings.tokenizer or settings.model)
    if settings.chat_template:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    return tokenizer


def _length(settings: Settings) -> int:
    """The length of the settings, at most the number of positions of the model."""
    return min(settings.length, models.longest(settings.model) or settings.length)


def _pad(tokenizer: Any) -> int:
    """The token id for padding. Without a pad token any id works: padding has no labels and is masked in attention."""
    return next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


def split(
    made: list[dict[str, list[int]]], held_out: int | None, seed: int
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Split sequences at random into (training, held out). The default for ``held_out`` is a tenth, at most 64.

    Raises:
        Usage: no training sequence would be left.
    """
    count = min(64, len(made) // 10) if held_out is None else held_out
    if count >= len(made):
        raise Usage(f"--held-out {count}: this leaves none of the {len(made)} sequences for training. Lower it.")
    order = list(range(len(made)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:count])
    return [each for i, each in enumerate(made) if i not in chosen], [made[i] for i in sorted(chosen)]


def _steps(settings: Settings, learnt: int) -> int:
    batches = math.ceil(learnt / settings.batch)
    by_epochs = math.ceil(settings.epochs * math.ceil(batches / settings.accumulate))
    return settings.steps if settings.steps > 0 else max(1, by_epochs)


def _arguments(settings: Settings, out: Path, save_every: int | None, learnt: int, mixed: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps,
        learning_rate=settings.rate,
        warmup_steps=settings.warmup,
        bf16=mixed,
        seed=settings.seed,
        logging_steps=max(1, _steps(settings, learnt) // _LOGS),
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 1,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )


def _run(settings: Settings, length: int, data: Sequences, model: nn.Module, out: Path, checkpoint: str | None) -> Run:
    if checkpoint is not None:
        return resumed(Run.load(out), int(checkpoint.rpartition("-")[2]))
    every, trained = models.parameters(model)
    shown = {
        "model": settings.model,
        "parameters": f"{every:,}, {trained:,} of them trained",
        "data": f"{settings.data}: {data.rows:,} rows ({', '.join(data.columns)}), {len(data.sequences):,} sequences",
        "length, batch": f"{length}, {settings.batch} x {settings.accumulate}",
        "learning rate": f"{settings.rate:g}",
        "options": ", ".join(f"{name}={value}" for name, value in settings.options.items()),
        "torch": torch.__version__,
    }
    return Run(f"tokenseek finetune {Path(settings.model).name} {Path(settings.data).name}", shown)


def _write_beginning(settings: Settings, out: Path, data: Sequences) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / _SETTINGS).write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    if data.bad:
        write_bad(data.bad, out / _BAD)


def _held_out_loss(work: Work, when: str) -> float | None:
    """Mean loss of the held-out labelled tokens; None without any. A resumed run keeps the value that it recorded."""
    known = work.watch.seen.run.settings
    name = f"held-out loss {when}"
    if work.held_out and name not in known:
        with work.console.status(f"{name} training"):
            known[name] = f"{work.trainer.evaluate()['eval_loss']:.4f}"
    return float(known[name]) if name in known else None


def _finished(work: Work) -> bool:
    return work.trainer.state.global_step >= work.trainer.state.max_steps


def _interrupted(work: Work) -> Interrupted:
    """The error that says what was saved and how to resume."""
    checkpoint = get_last_checkpoint(str(work.out))
    if checkpoint is None:
        return Interrupted("Interrupted before anything was saved.")
    again = resume_command(sys.argv)
    step = int(checkpoint.rpartition("-")[2])
    message = f"Interrupted; saved step {step} to {checkpoint}. Resume with:\n  {again}"
    return Interrupted(message, checkpoint=checkpoint, resume=again)


def resume_command(arguments: list[str]) -> str:
    """The command that resumes the run that was started with ``arguments``.

    >>> resume_command(["/usr/bin/tokenseek", "finetune", "m", "my data.txt"])
    "tokenseek finetune m 'my data.txt' --resume"
    """
    own = [each for each in arguments[1:] if each != "--resume"]
    return shlex.join(["tokenseek", *own, "--resume"])


def _done(work: Work, before: float | None, seconds: float, compare: bool) -> Answer:
    after = _held_out_loss(work, "after")
    model = work.out / _MODEL
    work.trainer.save_model(str(model))
    work.tokenizer.save_pretrained(model)
    run = work.watch.seen.run
    with work.console.status("explaining the model for the report"):
        _explain(work, run)
    figures = _figures(work, before, after, seconds) | {"model": str(model), "report": str(work.out / _REPORT)}
    _report(work)
    if compare:
        figures["all_tokens"] = _compared(work)
        _report(work)
    return Answer(figures, [_table(figures)])


def _report(work: Work) -> None:
    write_report(work.watch.seen.save(), work.out / _REPORT)


def _explain(work: Work, run: Run) -> None:
    """Add memory and graph of the longest batch to the run. On any error the report gives the reason in their place.

    The run has ended successfully by then: no error here may lose it.
    """
    run.settings.pop(_MISSING, None)
    longest = sorted(work.learnt, key=lambda each: len(each["input_ids"]))[-work.settings.batch :]
    device = next(work.model.parameters()).device
    batch = batch_of(longest, _pad(work.tokenizer), _length(work.settings))
    try:
        found = explain_without_weights(
            work.model, {name: x.to(device) for name, x in batch.items()}, work.settings.options
        )
    except Exception as error:
        error = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
        found = Explanation(f"{type(error).__name__}: {error}")
    if found.refusal:
        run.settings[_MISSING] = f"split of memory, graph: {found.refusal.splitlines()[0]}"
        work.console.print(f"[yellow]The report lacks {escape(run.settings[_MISSING])}[/]", soft_wrap=True)
        return
    run.memory = memory_of(found, work.model, work.trainer.optimizer)
    run.graphs = [str(found), *found.graphs]


def _compared(work: Work) -> dict[str, Any]:
    """Repeat the run on all tokens from the same initial weights; return its figures and keep its steps for the report.

    The memory of the trained model is freed first.
    """
    work.console.print("The same run on all tokens:")
    _give_up(work.model, work.trainer.optimizer)
    compiler = {name: work.settings.options[name] for name in _COMPILER if name in work.settings.options}
    settings = replace(work.settings, options={"keep_ratio": 1.0} | compiler)
    other = prepared(settings, work.out / _COMPARED, None, None, work.console)
    with stopping(other.watch.stop):
        other.trainer.train()
    if other.watch.stop.asked and not _finished(other):
        raise Interrupted(
            f"Interrupted during the run on all tokens. The run on kept tokens is complete: {work.out / _REPORT}"
        )
    work.watch.seen.run.plain = steps = other.watch.seen.run.steps
    return {
        "held_out_after": _held_out_loss(other, "after"),
        "loss_last": steps[-1].loss if steps else None,
        "step_seconds": _middle([each.seconds for each in steps]),
        "peak_bytes": _peak(steps),
    }


def _give_up(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Free weights, gradients and optimizer states in place: Trainer and accelerate hold references to the tensors."""
    for each in [*model.parameters(), *model.buffers()]:
        each.grad = None
        each.data = each.data.new_empty(0)
    optimizer.state.clear()


def _figures(work: Work, before: float | None, after: float | None, seconds: float) -> dict[str, Any]:
    steps = work.watch.seen.run.steps
    losses = [each.loss for each in steps if each.loss is not None]
    return {
        "steps": work.trainer.state.global_step,
        "seconds": round(seconds, 1),
        "step_seconds": _middle([each.seconds for each in steps]),
        "rows": work.data.rows,
        "skipped": len(work.data.bad),
        "sequences": len(work.data.sequences),
        "cut": work.data.cut,
        "tokens": work.data.tokens,
        "labelled": work.data.labelled,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "held_out": len(work.held_out),
        "held_out_before": before,
        "held_out_after": after,
        "kept": _middle([each.kept for each in steps]),
        "kept_labelled": _middle([each.labelled for each in steps]),
        "peak_bytes": _peak(steps),
    }


def _peak(steps: list[Step]) -> int | None:
    return max((each.peak for each in steps if each.peak is not None), default=None)


def _middle(values: list[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return median(known) if known else None


def _table(figures: dict[str, Any]) -> Table:
    out = Table(title="tokenseek finetune", title_justify="left", show_header=False)
    for name, text in _lines(figures):
        out.add_row(name, text)
    return out


def _lines(f: dict[str, Any]) -> list[tuple[str, str]]:
    def share(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.1%}"

    step = "" if f["step_seconds"] is None else f", {f['step_seconds']:.3f} s each (median)"
    held = "none held out"
    if f["held_out_before"] is not None and f["held_out_after"] is not None:
        held = f"{f['held_out_before']:.4f} -> {f['held_out_after']:.4f} ({f['held_out']} sequences)"
    other = f.get("all_tokens", {})
    beside = [] if not other else [("on all tokens", _beside(other))]
    return [
        ("data", f"{f['rows']:,} rows, {f['tokens']:,} tokens, {f['labelled']:,} of them labelled"),
        ("left out", f"{f['skipped']:,} rows skipped, {f['cut']:,} sequences truncated"),
        ("steps", f"{f['steps']:,} in {f['seconds']:,.1f} s{step}"),
        ("loss, first and last step", f"{_loss(f['loss_first'])} -> {_loss(f['loss_last'])}"),
        ("held-out loss", held),
        *beside,
        ("tokens kept", f"{share(f['kept'])}; of labelled tokens {share(f['kept_labelled'])}"),
        ("peak memory", _megabytes(f["peak_bytes"])),
        ("model", f["model"]),
        ("report", f["report"]),
    ]


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _megabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:,.0f} MB"


def _beside(other: dict[str, Any]) -> str:
    held = "" if other["held_out_after"] is None else f"held-out loss {other['held_out_after']:.4f}, "
    step = "" if other["step_seconds"] is None else f", {other['step_seconds']:.3f} s per step"
    return f"{held}loss of the last step {_loss(other['loss_last'])}{step}, peak {_megabytes(other['peak_bytes'])}"
