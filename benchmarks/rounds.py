"""Rounds: step time and peak memory of training in rounds, beside checkpointing with a chunked loss.

    python benchmarks/rounds.py                      # both settings of `SETTINGS`; about 25 minutes on 2 cores
    python benchmarks/rounds.py --settings short     # T=1024, B=4
    python benchmarks/rounds.py --report             # the table of existing results

Each row runs in a process of its own, from the same weights and ids, in turn; results are written after each process,
and the same command resumes a run that was stopped. `worker.py` defines the measurements.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import suite
from peers import COMPILE, EAGER, RIVAL, in_rounds
from shapes import Setting
from suite import Book, Clock, Result, Task, console

OUT = Path(__file__).parent / "results" / "rounds" / "results.json"
SETTINGS = {
    "short": Setting("small", length=1024, batch=4),
    "long": Setting("small", length=8192, batch=1),
}
ROWS = {
    "short": [EAGER, RIVAL, COMPILE, *(in_rounds(1, n) for n in (8, 16)), in_rounds(0.4, 8), in_rounds(0.1, 1)],
    "long": [RIVAL, *(in_rounds(1, n) for n in (16, 32)), in_rounds(0.1, 1), in_rounds(0.1, 4)],
}


def plan(options: argparse.Namespace) -> list[Task]:
    """The tasks in order; each turn has all rows of a setting, so that drift of the machine affects all alike."""
    return [
        Task(SETTINGS[name], row, turn, options.steps)
        for name in options.settings
        for turn in range(options.turns)
        for row in options.rows or ROWS[name]
    ]


def table(records: list[Result], name: str) -> list[str]:
    """The rows of a setting: medians, also relative to the rival."""
    mine = [one for one in records if one["setting"] == vars(SETTINGS[name]) and "failed" not in one]
    found = {row: ones for row in ROWS[name] if (ones := [one for one in mine if one["row"] == row])}
    if RIVAL not in found:
        return []
    step = {row: median(t for one in ones for t in one["step"]) for row, ones in found.items()}
    peak = {row: median(one["peak"] for one in ones) for row, ones in found.items()}
    first = {row: median(one["first"] for one in ones) for row, ones in found.items()}
    lines = ["| row | step (s) | of the rival | peak (MB) | of the rival | first step (s) | loss |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row, ones in found.items():
        cells = (
            f"{step[row]:.2f} | {step[row] / step[RIVAL]:.2f} | {peak[row] / 1e6:.0f} | {peak[row] / peak[RIVAL]:.2f}"
        )
        lines.append(f"| {row} | {cells} | {first[row]:.0f} | {ones[0]['loss']:.4f} |")
    return ["", f"{SETTINGS[name]}; the rival is {RIVAL}:", "", *lines, ""]


def main(words: list[str]) -> int:
    """Measure and print; return 1 if there was no time for some tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rows", nargs="+", metavar="ROW")
    parser.add_argument("--turns", type=int, default=1, help="processes per row")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--minutes", type=float, help="time limit; repeat the command to resume")
    parser.add_argument("--report", action="store_true", help="only print existing results")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(words)
    book = Book.open(options.out)
    left = 0 if options.report else suite.run(plan(options), book, Clock(options.minutes))
    for name in options.settings:
        console.print(*table(book.records, name), sep="\n", highlight=False, markup=False)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
