"""Run tasks, each in a process of its own, and write results after each. The same command resumes a stopped run."""

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
    """The task of one process: measure a row of a setting, for at least `steps` steps and `seconds` seconds.

    With `limit`: whether it fits on a card of `limit` GiB.
    """

    setting: Setting
    row: str
    round: int = 0
    steps: int = 2
    limit: float = 0
    seconds: float = 0

    def same(self, record: Result) -> bool:
        """True if a record is of this task, with any number of steps."""
        mine = (asdict(self.setting), self.row, self.round, self.limit)
        return mine == (record["setting"], record["row"], record["round"], record["limit"])

    def __str__(self) -> str:
        limit = f" in {self.limit:g} GiB" * bool(self.limit)
        return f"{self.setting}: {self.row}{limit}"


@dataclass
class Book:
    """A file of records, one for each task that was run. `run`: identifies the run that measured a figure."""

    path: Path
    run: str
    records: list[Result]

    @classmethod
    def open(cls, path: Path) -> "Book":
        """Read existing records; create the folder if needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        records = json.loads(path.read_text())["records"] if path.exists() else []
        return cls(path, time.strftime("%Y-%m-%dT%H:%M:%S"), records)

    def find(self, task: Task) -> Result | None:
        """The record of this task, or None."""
        return next((record for record in self.records if task.same(record)), None)

    def add(self, task: Task, result: Result, where: Result) -> Result:
        """Add a record, and write the file at once."""
        self.records.append({**asdict(task), **result, "run": self.run, "machine": where})
        self.path.write_text(json.dumps({"records": self.records}, indent=1) + "\n")
        return self.records[-1]


class Clock:
    """The time limit of a suite; tasks that don't fit are left for the next run."""

    def __init__(self, minutes: float | None):
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def left(self) -> float | None:
        """Seconds left; None without a limit."""
        return None if self.end == float("inf") else max(0.0, self.end - time.monotonic())


def spawn(task: Task, cache: Path, seconds: float | None) -> Result | None:
    """Run the task in a new process. Errors are part of the result; None if time ran out."""
    exact = EXACT_MEMORY if task.setting.device == "cpu" else {}
    environment = os.environ | exact | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, str(WORKER), json.dumps(asdict(task))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:  # usually killed by the system's out-of-memory killer
        return {"failed": f"exit status {done.returncode}", "memory": done.returncode == -9}
    result = json.loads(done.stdout.splitlines()[-1])
    for line in done.stderr.splitlines():
        if "TokenSeekWarning" in line or ("failed" in result and not result["memory"]):
            console.print(line, style="dim", markup=False, highlight=False)
    return result


def perform(task: Task, book: Book, clock: Clock, where: Result, cache: Path) -> Result | None:
    """The record of a task, from the book or from a new process; None if time ran out."""
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
    """Run all tasks in order; return the number that there was no time for."""
    left, where = 0, machine()
    with tempfile.TemporaryDirectory() as caches:
        for task in tasks:
            cache = Path(caches) / str(abs(hash((task.setting, task.row))))  # only the first round compiles
            left += perform(task, book, clock, where, cache) is None
    if left:
        console.print(f"There was no time for {left} tasks. Repeat the command to run them.", highlight=False)
    return left


def describe(record: Result) -> str:
    """A short text for the record of one process."""
    if "failed" in record:
        return f"failed: {record['failed']}"
    if record["limit"]:
        return f"{'fits' if record['fits'] else 'does not fit'}, {record['used'] / 2**30:.2f} GiB"
    times = f"first step {record['first']:.1f} s, then {sorted(record['step'])[len(record['step']) // 2]:.3g} s"
    return f"{times}, peak {record['peak'] / 1e6:.1f} MB, loss {record['loss']:.3f}"


def turns(pairs: list[tuple[Setting, str]], options: argparse.Namespace) -> list[Task]:
    """Tasks in rounds. Each round has all rows of a setting, so that drift of the machine affects all rows equally."""
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
    """The machine and versions behind the figures."""
    where = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform()}
    if torch.cuda.is_available():
        where["gpu"] = torch.cuda.get_device_name()
    return where | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()}


def parser(description: str | None, name: str, parts: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with the options of both suites."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    every, out = list(parts), f"benchmarks/results/{name}"
    parser.set_defaults(name=name)
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help=f"of {', '.join(every)}")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=1, help="processes per row, default %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="minimum of timed steps per process, default %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0,
        help="minimum seconds of timed steps per process, default %(default)s (quick: 0)",
    )
    parser.add_argument("--minutes", type=float, help="time limit; repeat the command to resume")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny shapes")
    parser.add_argument("--plan", action="store_true", help="print the tasks and stop")
    parser.add_argument("--report", action="store_true", help="only write tables, plots and claims of existing results")
    parser.add_argument("--out", type=Path, help=f"folder of results and report, default {out}; quick: out/{name}")
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse options and set paths. Quick figures go to out/; only full results in the default folder go to the page."""
    options = parser.parse_args(words)
    options.seconds *= not options.quick
    options.page = None if options.out or options.quick else ROOT / "docs/benchmarks.md"
    options.out = options.out or ROOT / ("out" if options.quick else "benchmarks/results") / options.name
    return options
