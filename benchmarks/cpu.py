"""The CPU suite: the cost of a training step, compared with plain PyTorch and its ways to save memory. `make bench` or

    python benchmarks/cpu.py --parts full --settings 1 2 3            # step time and peak memory of the main rows
    python benchmarks/cpu.py --parts length ratio                     # cost and memory by T and by keep_ratio
    python benchmarks/cpu.py --parts lora others                      # LoRA; the other rows
    python benchmarks/cpu.py --report                                 # tables, plots and claims from existing results

Each row runs in a process of its own, from the same weights and ids. Results are written after each process, and the
same command resumes a run that was stopped. `worker.py` defines the measurements, `peers.py` the rows.
"""

import argparse
import sys
from dataclasses import replace

import report
import suite
from peers import COMPILE, DEFAULT, EAGER, FORWARD, MAIN, RIVAL, ROWS
from shapes import Setting
from suite import Book, Clock, Task, turns

SETTINGS = {
    "1": Setting("small", length=1024, batch=4),
    "2": Setting("small, V=32000", length=2048, batch=2),
    "3": Setting("small", length=8192, batch=1),
}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
BY_LENGTH = [EAGER, RIVAL, COMPILE, FORWARD, DEFAULT]
WITHOUT_LORA = {FORWARD}  # its forward is the same

Pair = tuple[Setting, str]


def full(settings: list[Setting]) -> list[Pair]:
    """All parameters, the main rows."""
    return [(setting, row) for setting in settings for row in MAIN]


def lora(settings: list[Setting]) -> list[Pair]:
    """Adapters, the main rows."""
    return [(replace(s, training="lora"), row) for s in settings for row in MAIN if row not in WITHOUT_LORA]


def others(settings: list[Setting]) -> list[Pair]:
    """All parameters, the other rows."""
    return [(setting, row) for setting in settings for row in ROWS if row not in MAIN]


def lengths() -> list[Setting]:
    """One sequence of the model of setting 1."""
    return [replace(SETTINGS["1"], length=T, batch=1) for T in LENGTHS]


def ratios() -> list[Setting]:
    """Setting 1 with all ratios."""
    return [replace(SETTINGS["1"], keep_ratio=r) for r in RATIOS]


def length(settings: list[Setting]) -> list[Pair]:
    """Cost and memory by T."""
    return [(setting, row) for setting in lengths() for row in BY_LENGTH]


def ratio(settings: list[Setting]) -> list[Pair]:
    """Cost and memory by keep_ratio, with a forward (F) and plain training for comparison."""
    return [*((setting, DEFAULT) for setting in ratios()), (SETTINGS["1"], FORWARD), (SETTINGS["1"], COMPILE)]


PARTS = {"full": full, "length": length, "ratio": ratio, "lora": lora, "others": others}


def plan(options: argparse.Namespace) -> list[Task]:
    """The tasks in order, each once."""
    chosen = [SETTINGS[name] for name in options.settings]
    pairs = [pair for name in options.parts for pair in PARTS[name](chosen)]
    if options.rows:
        pairs = [(setting, row) for setting, row in pairs if row in options.rows]
    return turns([(sized(setting, options), row) for setting, row in pairs], options)


def sized(setting: Setting, options: argparse.Namespace) -> Setting:
    """The setting; with `--quick` two small layers and short sequences."""
    return replace(setting, shape="quick", length=max(16, setting.length // 16)) if options.quick else setting


def shown(options: argparse.Namespace) -> report.Shown:
    """The settings and sweeps of the report."""
    settings = {name: sized(setting, options) for name, setting in SETTINGS.items()}
    sweeps = ([sized(setting, options) for setting in sweep] for sweep in (lengths(), ratios()))
    by_length, by_ratio = sweeps
    return report.Shown(settings, by_length, BY_LENGTH, by_ratio)


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = suite.parser(__doc__, "cpu", PARTS)
    # on a shared machine, other load comes in bursts of seconds and drifts over minutes: repeat short steps, interleave
    # rows
    parser.set_defaults(rounds=2, seconds=15)
    every = list(SETTINGS)
    parser.add_argument("--settings", nargs="+", choices=every, default=every, help="of full, lora, others")
    return suite.parse(parser, words)


def main(words: list[str]) -> int:
    """Measure, print and write; return 1 if there was no time for some tasks."""
    options = arguments(words)
    if options.plan:
        print(*plan(options), sep="\n")
        return 0
    book = Book.open(options.out / "results.json")
    left = 0 if options.report else suite.run(plan(options), book, Clock(options.minutes))
    report.write(report.cpu(book.records, shown(options), options.out), options.out, options.page, options.name)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
