"""The GPU suite: training steps in bfloat16 on one CUDA device, and the longest sequence that fits. `make bench-gpu` or

    python benchmarks/gpu.py --minutes 9                               # most important first; repeat it to resume
    python benchmarks/gpu.py --parts longest --rows tokenseek torch.compile
    python benchmarks/gpu.py --report                                  # tables and claims from existing results
    python benchmarks/gpu.py --device cpu --quick                      # smoke test without a GPU

Shapes are those of Llama-3.2-1B and 3B and Llama-3.1-8B with random weights. Each row runs in a process of its own, and
results are written after each. Peak is the memory that PyTorch allocated beyond weights and gradients (`worker.py`).
*Seek* is a step with one kept token, without the work on kept rows; *ditch* is the time that a step takes beyond it.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import report
import suite
import torch
from peers import CHECKPOINT, COMPILE, DEFAULT, EAGER, FORWARD, RIVAL, ROWS, SEEK
from shapes import Setting
from suite import Book, Clock, Result, Task, console, turns
from worker import room

BASE = Setting("1B", length=4096, batch=8, device="cuda", dtype="bfloat16")
FIRST = [DEFAULT, COMPILE, CHECKPOINT, RIVAL, SEEK, FORWARD, EAGER]
SHORT = [DEFAULT, COMPILE, CHECKPOINT, RIVAL]
LENGTHS = (1024, 4096, 16384, 32768, 65536, 131072)
BY_LENGTH = [DEFAULT, SEEK, RIVAL, COMPILE]
LARGER = [
    replace(BASE, shape="8B", batch=1, training="lora"),
    replace(BASE, shape="8B", batch=1, training="qlora"),
    replace(BASE, shape="3B", batch=1),
    replace(BASE, shape="8B", batch=8, training="lora"),
    replace(BASE, shape="3B"),
]
FITTED = [replace(BASE, batch=1), replace(BASE, shape="8B", batch=1, training="lora")]
CAPACITIES = (141.0, 80.0, 48.0, 24.0)
"""GiB of cards, the largest first: its results often answer for the smaller ones too."""
SHORTEST, LONGEST = 2048, 2**18

Pair = tuple[Setting, str]


def lengths() -> list[Setting]:
    """One sequence of the 1B shape."""
    return [replace(BASE, length=T, batch=1) for T in LENGTHS]


def steps() -> list[Pair]:
    """The 1B shape, 8 x 4096 tokens."""
    return [(BASE, row) for row in FIRST]


def length() -> list[Pair]:
    """Cost and memory by T."""
    return [(setting, row) for setting in lengths() for row in BY_LENGTH]


def shapes() -> list[Pair]:
    """3B, and 8B with adapters on a bf16 and on a 4-bit base."""
    return [(setting, row) for setting in LARGER for row in (*SHORT, SEEK)]


def others() -> list[Pair]:
    """The 1B shape, the other rows."""
    return [(BASE, row) for row in ROWS if row not in FIRST]


PARTS: dict[str, Callable[[], list[Pair]]] = {"steps": steps, "length": length, "shapes": shapes, "others": others}


def plan(options: argparse.Namespace) -> list[Task]:
    """The tasks in order, each once; those of `longest` depend on results."""
    pairs = [pair for name in options.parts if name in PARTS for pair in PARTS[name]()]
    if options.rows:
        pairs = [(setting, row) for setting, row in pairs if row in options.rows]
    return turns([(sized(setting, options), row) for setting, row in pairs], options)


def sized(setting: Setting, options: argparse.Namespace) -> Setting:
    """The setting on the device of the options; with `--quick` two small layers and short sequences."""
    if options.device == "cpu":
        setting = replace(setting, device="cpu", dtype="float32")
    if options.quick:
        setting = replace(setting, shape="quick", length=max(16, setting.length // 64), batch=min(setting.batch, 2))
    return setting


Fits = Callable[[int], bool | None]


def longest(fits: Fits, shortest: int, most: int) -> int | None:
    """The longest length that fits, to an eighth: doubled until one doesn't fit, then bisected; 0 if none fits.

    Returns None if `fits` does (no time, or another failure).
    """
    good, bad, length = 0, most * 2, shortest
    while length < bad and length <= most:
        if (answer := fits(length)) is None:
            return None
        good, bad = (length, bad) if answer else (good, length)
        length = next_length(good, bad)
    return good


def next_length(good: int, bad: int) -> int:
    """The next length to try: twice the one that fits, or the middle, in steps of an eighth; `bad` if none is left."""
    if not good or bad > 2 * good:
        return 2 * good or bad
    grain = max(1, good // 8)
    return good + max(grain, (bad - good) // 2 // grain * grain) if bad - good > grain else bad


def answer(task: Task, records: list[Result]) -> bool | None:
    """The answer from existing results: a length fits if it used no more; not if a larger limit was too small."""
    for record in records:
        if record["limit"] and (record["row"], Setting(**record["setting"])) == (task.row, task.setting):
            if "used" in record:
                return record["used"] <= room(task.limit)
            if record["memory"] and record["limit"] >= task.limit:
                return False
    return None


def find_longest(options: argparse.Namespace, book: Book, clock: Clock) -> int:
    """Find the longest sequence for each setting, row and capacity; return the number without an answer."""
    left = 0
    for setting in [sized(setting, options) for setting in FITTED]:
        for row in options.rows or SHORT:
            for capacity in options.capacities:
                found = search(setting, row, capacity, options, book, clock)
                text = "no answer" if found is None else f"T = {found}"
                name = f"{setting.shape}, {setting.training}, {row}"
                console.print(f"{name}: longest in {capacity:g} GiB: {text}", highlight=False, markup=False)
                left += found is None
    return left


def search(s: Setting, row: str, capacity: float, options: argparse.Namespace, book: Book, clock: Clock) -> int | None:
    """The longest sequence of a row in `capacity` GiB."""

    def fits(length: int) -> bool | None:
        task = Task(replace(s, length=length), row, limit=capacity)
        if (known := answer(task, book.records)) is not None:
            return known
        suite.run([task], book, clock)
        record = book.find(task)
        return record["fits"] if record and "fits" in record else False if record and record["memory"] else None

    short, most = (32, 512) if options.quick else (SHORTEST, LONGEST)
    return longest(fits, short, most)


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = suite.parser(__doc__, "gpu", [*PARTS, "longest"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--capacities", type=float, nargs="+", default=list(CAPACITIES), help="GiB, of longest")
    return suite.parse(parser, words)


def main(words: list[str]) -> int:
    """Measure, print and write; return 1 if there was no time for some tasks."""
    options = arguments(words)
    if options.plan:
        print(*plan(options), sep="\n")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available() and not options.report:
        print("No CUDA device was found. Use `--device cpu --quick` to try the suite without one.")
        return 1
    book, clock = Book.open(options.out / "results.json"), Clock(options.minutes)
    left = 0
    if not options.report:
        left = suite.run(plan(options), book, clock)
        left += find_longest(options, book, clock) if "longest" in options.parts else 0
    write_report(book, options)
    return int(bool(left))


def write_report(book: Book, options: argparse.Namespace) -> None:
    """Write the tables of the existing results."""
    sweep = [sized(setting, options) for setting in lengths()]
    written = report.gpu(book.records, sized(BASE, options), sweep, BY_LENGTH, options.out)
    report.write(written, options.out, options.page, options.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
