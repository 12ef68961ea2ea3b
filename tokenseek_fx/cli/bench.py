"""Bench: a step of the user's model on all tokens, with gradient checkpointing, and on the kept tokens.

Each is measured in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .answer import Answer, progress_console
from .models import Adapter

WAYS = {
    "compile": "torch.compile, all tokens",
    "checkpoint": "gradient checkpointing, all tokens",
    "tokenseek": "tokenseek",
}
_NOTE = (
    "Weights and tokens are random: neither time nor memory depends on them. step: median time of forward, backward "
    "and update. peak: memory beyond weights, gradients and optimizer states."
)


@dataclass(frozen=True)
class Task:
    """One way to train one model; ``way``: a key of ``WAYS``; ``options``: those of the backend."""

    way: str
    model: str
    batch: int
    length: int
    steps: int
    dtype: str
    adapter: Adapter | None
    options: dict[str, Any]


def bench(tasks: Sequence[Task]) -> Answer:
    """Measure each task. The exit code is 1 if one failed."""
    results: dict[str, dict[str, Any]] = {}
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        for task in tasks:
            shown = progress.add_task(WAYS[task.way])
            results[task.way] = spawn(task)
            progress.remove_task(shown)
    first = tasks[0]
    data = {
        "model": first.model,
        "batch": first.batch,
        "length": first.length,
        "options": first.options,
        "ways": results,
    }
    failed = any("failed" in found for found in results.values())
    return Answer(data, [_table(first, results), _NOTE], code=int(failed))


def spawn(task: Task) -> dict[str, Any]:
    """Measure the task in a new process: the result of ``worker.measure``, or ``{"failed": reason}``."""
    command = [sys.executable, "-m", "tokenseek_fx.cli.worker", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _table(task: Task, results: dict[str, dict[str, Any]]) -> Table:
    title = f"{task.model}: {task.batch} x {task.length} tokens, {'LoRA' if task.adapter else 'full training'}"
    out = Table("", title=title, title_justify="left")
    for name in ("first step s", "step s", "tokens/s", "peak MB"):
        out.add_column(name, justify="right")
    for way, found in results.items():
        out.add_row(WAYS[way], *_cells(task, found))
    return out


def _cells(task: Task, found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [f"[red]failed[/]: {escape(found['failed'][:200])}", "", "", ""]
    peak = "unknown" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e6:,.0f}"
    rate = task.batch * task.length / found["step_seconds"]
    return [f"{found['first_step_seconds']:.1f}", f"{found['step_seconds']:.3f}", f"{rate:,.0f}", peak]
