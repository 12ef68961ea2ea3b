"""Runs a plan of tasks, each in a process of its own, and writes what is known after every one; goes on where it was stopped."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers import ROWS
from rich.console import Console
from shapes import Setting
from worker import EXACT_MEMORY

Result = dict[str, Any]
console = Console(width=None if sys.stdout.isatty() else 140)
WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Task:
    """One process: a row of a setting, at least `steps` steps and `seconds`; with `limit`, whether it fits on a card of so many GiB."""

    setting: Setting
    row: str
    round: int = 0
    steps: int = 2
    limit: float = 0
    seconds: float = 0

    def same(self, record: Result) -> bool:
        """Whether a record is of this task, however many steps it took."""
        mine = (asdict(self.setting), self.row, self.round, self.limit)
        return mine == (record["setting"], record["row"], record["round"], record["limit"])

    def __str__(self) -> str:
        limit = f" in {self.limit:g} GiB" * bool(self.limit)
        return f"{self.setting}: {self.row}{limit}"


@dataclass
class Book:
    """Records in a file, one for every task that was run; `run` tells figures of one run from those of another."""

    path: Path
    run: str
    records: list[Result]

    @classmethod
    def open(cls, path: Path) -> "Book":
        """What is there; a folder is made for it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        records = json.loads(path.read_text())["records"] if path.exists() else []
        return cls(path, time.strftime("%Y-%m-%dT%H:%M:%S"), records)

    def find(self, task: Task) -> Result | None:
        """The record of this task, if there is one."""
        return next((record for record in self.records if task.same(record)), None)

    def add(self, task: Task, result: Result, where: Result) -> Result:
        """Written at once: what is known survives a stop."""
        self.records.append({**asdict(task), **result, "run": self.run, "machine": where})
        self.path.write_text(json.dumps({"records": self.records}, indent=1) + "\n")
        return self.records[-1]


class Clock:
    """The time a suite may take; what can't be done in it is left for the next run."""

    def __init__(self, minutes: float | None):
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def left(self) -> float | None:
        """Seconds, None where there is no limit."""
        return None if self.end == float("inf") else max(0.0, self.end - time.monotonic())


def spawn(task: Task, cache: Path, seconds: float | None) -> Result | None:
    """The task in a process of its own; its errors are part of the result; None where time ran out."""
    exact = EXACT_MEMORY if task.setting.device == "cpu" else {}
    environment = os.environ | exact | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, str(WORKER), json.dumps(asdict(task))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:  # killed, by the system's out-of-memory killer as a rule
        return {"failed": f"exit status {done.returncode}", "memory": done.returncode == -9}
    result = json.loads(done.stdout.splitlines()[-1])
    for line in done.stderr.splitlines():
        if "TokenSeekWarning" in line or ("failed" in result and not result["memory"]):
            console.print(line, style="dim", markup=False, highlight=False)
    return result


def perform(task: Task, book: Book, clock: Clock, where: Result, cache: Path) -> Result | None:
    """The record of a task, from the book or from a process; None where time ran out."""
    if (known := book.find(task)) is not None:
        return known
    if (left := clock.left()) == 0:
        return None
    begin = time.monotonic()
    if (result := spawn(task, cache, left)) is None:
        return None
    record = book.add(task, result, where)
    console.print(f"{task}: {describe(record)} [{time.monotonic() - begin:.0f} s]", highlight=False, markup=False)
    return record


def run(tasks: Iterable[Task], book: Book, clock: Clock) -> int:
    """All of them, in their order; how many there was no time for."""
    left, where = 0, machine()
    with tempfile.TemporaryDirectory() as caches:
        for task in tasks:
            cache = Path(caches) / str(abs(hash((task.setting, task.row))))  # the first step of round one compiles
            left += perform(task, book, clock, where, cache) is None
    if left:
        console.print(f"No time for {left} tasks: the same command goes on with them.", highlight=False)
    return left


def describe(record: Result) -> str:
    """One process in half a line."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    if record["limit"]:
        return f"{'fits' if record['fits'] else 'does not fit'}, {record['used'] / 2**30:.2f} GiB"
    times = f"first step {record['first']:.1f} s, then {sorted(record['step'])[len(record['step']) // 2]:.3g} s"
    return f"{times}, peak {record['peak'] / 1e6:.1f} MB, loss {record['loss']:.3f}"


def turns(pairs: list[tuple[Setting, str]], options: argparse.Namespace) -> list[Task]:
    """Every row of a setting once, then every row again: a drift of the machine meets all rows alike."""
    settings = list(dict.fromkeys(setting for setting, _ in pairs))
    tasks = [
        Task(setting, row, number, options.steps, seconds=options.seconds)
        for setting in settings
        for number in range(options.rounds)
        for other, row in pairs
        if other == setting
    ]
    return list(dict.fromkeys(tasks))


def machine() -> Result:
    """Where the figures come from."""
    where = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform()}
    if torch.cuda.is_available():
        where["gpu"] = torch.cuda.get_device_name()
    return where | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()}


def parser(description: str | None, name: str, parts: Iterable[str]) -> argparse.ArgumentParser:
    """The options that both suites have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    every, out = list(parts), f"benchmarks/results/{name}"
    parser.set_defaults(name=name)
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help=f"of {', '.join(every)}")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=1, help="processes per row, default %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process at least, default %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=0, help="of timed steps per process at least, default %(default)s (quick: 0)"
    )
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--quick", action="store_true", help="does it run: tiny shapes")
    parser.add_argument("--plan", action="store_true", help="print the tasks and stop")
    parser.add_argument("--report", action="store_true", help="no measuring: tables, plots and claims of what is there")
    parser.add_argument("--out", type=Path, help=f"folder of results and report, default {out}; quick: out/{name}")
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Quick figures stay out of the folder of results, and only its report is shown on the page."""
    options = parser.parse_args(words)
    options.seconds *= not options.quick
    options.page = None if options.out or options.quick else ROOT / "docs/benchmarks.md"
    options.out = options.out or ROOT / ("out" if options.quick else "benchmarks/results") / options.name
    return options
