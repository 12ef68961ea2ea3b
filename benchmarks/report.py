"""Tables, plots and claims of the suites, made from their results."""

import json
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import charts
from peers import CAVEATS, CHECKPOINT, COMPILE, DEFAULT, EAGER, FORWARD, RANDOM, RIVAL, ROWS, SEEK, WHOLE
from plot import write_table
from shapes import SHAPES, Setting
from worker import room

Result = dict[str, Any]
Rows = dict[str, Result]
"""Row -> figures, of one setting."""

LOSS = (
    "The loss is that of the first step at random weights: it shows that the rows compute the same model, not how well "
    "they learn. [The quality study](../../../docs/when-to-use.md#what-a-selection-learns) measures training on a part "
    "of the tokens."
)


def summaries(records: list[Result]) -> dict[Setting, Rows]:
    """The rows of each setting, in the order of `ROWS`; figures are medians over rounds."""
    found: dict[Setting, dict[str, list[Result]]] = {}
    for record in records:
        if not record["limit"]:
            found.setdefault(Setting(**record["setting"]), {}).setdefault(record["row"], []).append(record)
    return {s: {row: summary(rows[row]) for row in ROWS if row in rows} for s, rows in found.items()}


def summary(rounds: list[Result]) -> Result:
    """Medians of all timed steps and of peaks; first step, loss and saved bytes come from the first round."""
    rounds = sorted(rounds, key=lambda record: record["round"])
    if failed := [record for record in rounds if "failed" in record]:
        return failed[0]
    times = {key: statistics.median(s for r in rounds for s in r[key]) for key in ("step", "forward")}
    bytes_ = {key: statistics.median(r[key] for r in rounds) for key in ("peak", "resident")}
    first = rounds[0]
    tokens = first["setting"]["batch"] * first["setting"]["length"]
    saved = first["activations"] + first["logits"]
    return {**first, **times, **bytes_, "saved": saved, "tokens": tokens / times["step"]}


# heading -> (key of the figure, format, divisor, the row that it is compared with)
Columns = dict[str, tuple[str, str, float, str | None]]
CPU: Columns = {
    "step s": ("step", ".2f", 1, COMPILE),
    "peak MB": ("peak", ".0f", 1e6, EAGER),
    "with allocator slack": ("resident", ".0f", 1e6, EAGER),
    "saved MB": ("saved", ".1f", 1e6, COMPILE),
    "first step s": ("first", ".1f", 1, COMPILE),
    "loss": ("loss", ".3f", 1, None),
}
GPU: Columns = {
    "tokens/s": ("tokens", ".0f", 1, COMPILE),
    "step s": ("step", ".3f", 1, COMPILE),
    "of it forward": ("forward", ".3f", 1, None),
    "peak GB": ("peak", ".2f", 1e9, CHECKPOINT),
    "reserved GB": ("resident", ".2f", 1e9, None),
    "saved GB": ("saved", ".2f", 1e9, None),
    "first step s": ("first", ".0f", 1, None),
    "loss": ("loss", ".3f", 1, None),
}


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def rows_table(rows: Rows, columns: Columns) -> str:
    """The table of a setting: a line for each row, with ratios to the row that the heading names."""
    heads = [f"{name} (/ {other})" if other else name for name, (*_, other) in columns.items()]
    return table(["", *heads], [[row, *cells(result, rows, columns)] for row, result in rows.items()])


def cells(result: Result, rows: Rows, columns: Columns) -> list[str]:
    """The cells of one row."""
    if "failed" in result:
        return [f"none: {result['failed']}", *[""] * (len(columns) - 1)]
    return [
        cell(result[key], rows.get(other or "", {}).get(key), style, by) for key, style, by, other in columns.values()
    ]


def cell(value: float, other: float | None, style: str, divisor: float) -> str:
    """A figure with its ratio, as `1.84 (0.37x)`."""
    text = format(value / divisor, style)
    return f"{text} ({value / other:.2f}x)" if other else text


def scoring(rows: Rows) -> list[str]:
    """The cost of scoring, compared with random rows, which need no head for all tokens, and with a full loss added."""
    lines = []
    for other in (RANDOM, WHOLE):
        if all("step" in rows.get(name, {}) for name in (DEFAULT, other, FORWARD)):
            share = (rows[DEFAULT]["step"] - rows[other]["step"]) / rows[FORWARD]["step"]
            more = (rows[DEFAULT]["peak"] - rows[other]["peak"]) / 1e6
            lines.append(f"{DEFAULT} beside {other}: {share:+.2f} of a forward, {more:+.0f} MB of the peak.")
    return lines


@dataclass(frozen=True)
class Claim:
    """The claim that `row`'s figure is at most (`least`: at least) `factor` times `other`'s."""

    setting: Setting
    key: str
    factor: float
    other: str
    least: bool = False
    row: str = DEFAULT

    def verdict(self, found: dict[Setting, Rows]) -> str:
        """Whether the claim is met, with both figures and their ratio; marked if they come from two runs."""
        mine, theirs = (found.get(self.setting, {}).get(row, {}) for row in (self.row, self.other))
        sign = ">=" if self.least else "<="
        text = f"{self.setting}: {self.key} of {self.row} {sign} {self.factor} x {self.other}"
        if theirs.get("memory") and "failed" in theirs and "failed" not in mine and mine:
            return f"{text}: met, {self.other} ran out of memory"
        if self.key not in mine or self.key not in theirs or "failed" in mine or "failed" in theirs:
            return f"{text}: not measured"
        ratio = mine[self.key] / theirs[self.key]
        met = ratio >= self.factor if self.least else ratio <= self.factor
        runs = "" if mine["run"] == theirs["run"] else " (figures of two runs)"
        return (
            f"{text}: {'met' if met else 'NOT MET'}, {ratio:.3f} ({mine[self.key]:.4g} / {theirs[self.key]:.4g}){runs}"
        )


def cpu_claims(settings: dict[str, Setting]) -> list[Claim]:
    """The project's goals on a CPU."""
    limits = {"1": (0.42, 0.10), "2": (0.42, 0.05), "3": (0.40, 0.06)}
    against_plain = [
        Claim(settings[name], key, factor, other)
        for name, (step, peak) in limits.items()
        for key, factor, other in (("step", step, COMPILE), ("peak", peak, EAGER))
    ]
    against_rival = [
        Claim(settings[name], key, factor, RIVAL) for name in "12" for key, factor in (("step", 0.40), ("peak", 0.50))
    ]
    return [*against_plain, *against_rival]


def gpu_claims(base: Setting) -> list[Claim]:
    """The project's goals on an H200, for the 1B shape with 8 x 4096 tokens."""
    faster = [Claim(base, "tokens", factor, row, least=True) for factor, row in ((2.0, COMPILE), (2.8, CHECKPOINT))]
    return [*faster, Claim(base, "peak", 0.5, CHECKPOINT)]


def machines(records: list[Result]) -> list[str]:
    """The machines and versions behind the figures, each once."""
    found = [{key: value for key, value in record["machine"].items() if key != "load"} for record in records]
    return list(dict.fromkeys(json.dumps(where) for where in found))


def section(setting: Setting, rows: Rows, columns: Columns) -> str:
    """The section of one setting: description, table, cost of scoring."""
    about = f"Llama, random weights: {SHAPES[setting.shape]}; {setting.dtype}."
    return "\n\n".join([f"### {setting}", about, rows_table(rows, columns), *scoring(rows)])


def sweep_table(sweep: dict[Any, Rows], name: str, rows: list[str], key: str, style: str, unit: float) -> str:
    """A table with a column for each row of the benchmark and a line for each point of the sweep."""
    lines = []
    for point, found in sweep.items():
        values = [found.get(row, {}).get(key) for row in rows]
        lines.append([str(point), *("" if value is None else format(value / unit, style) for value in values)])
    return table([name, *rows], lines)


def model_table(sweep: dict[float, Rows], row: str, base: Rows) -> str:
    """By keep_ratio: step time in forwards with 1 + 3r; saved bytes with keys/values + r x those of plain training."""
    lines = []
    for r, found in sweep.items():
        if "step" in found.get(row, {}) and "step" in base.get(FORWARD, {}):
            one, forward = found[row], base[FORWARD]["step"]
            saved = (
                f"{charts.kept_bytes(one['setting'], r, base) / 1e6:.1f}" if "saved" in base.get(COMPILE, {}) else ""
            )
            figures = [f"{one['step']:.2f}", f"{one['step'] / forward:.2f}", f"{1 + 3 * r:.2f}"]
            figures += [f"{one['saved'] / 1e6:.1f}", saved, f"{one['peak'] / 1e6:.0f}", f"{one['loss']:.3f}"]
            lines.append([str(r), *figures])
    heads = ["step s", "in forwards F", "F + 3rF", "saved MB", "keys/values + r x torch.compile's", "peak MB", "loss"]
    return table(["r", *heads], lines)


def slope(sweep: dict[float, Rows], row: str, base: Rows) -> str:
    """The regression line of step times by keep_ratio r, in forwards F."""
    points = {
        r: found[row]["step"] / base[FORWARD]["step"] for r, found in sweep.items() if "step" in found.get(row, {})
    }
    if len(points) < 2:
        return ""
    line = statistics.linear_regression(list(points), list(points.values()))
    return f"The line through the measured steps is {line.intercept:.2f} F + {line.slope:.2f} rF."


@dataclass(frozen=True)
class Shown:
    """The settings of a report: those with tables of their own, and two sweeps."""

    settings: dict[str, Setting]
    lengths: list[Setting]
    length_rows: list[str]
    ratios: list[Setting]


def cpu(records: list[Result], shown: Shown, out: Path) -> str:
    """The report of the CPU suite; its plots go to `out`."""
    found = summaries(records)
    lengths = {s.length: found[s] for s in shown.lengths if s in found}
    ratios = {s.keep_ratio: found[s] for s in shown.ratios if s in found}
    sweeps = {*shown.lengths, *shown.ratios}.difference(shown.settings.values())
    tables = {s: found[s] for s in dict.fromkeys([*shown.settings.values(), *found]) if s in found and s not in sweeps}
    base = found.get(shown.settings["1"], {})
    parts = [section(s, rows, CPU) for s, rows in tables.items()]
    parts += drawn("steps", out, charts.steps(tables)) if tables else []
    if len(lengths) > 1:
        parts += length_section(lengths, shown.length_rows)
        parts += drawn("length", out, charts.lengths(lengths, shown.length_rows))
    if len(ratios) > 1 and all("step" in base.get(row, {}) for row in (FORWARD, COMPILE)):
        parts += ["### By keep_ratio", f"{DEFAULT}, {shown.settings['1']}.", model_table(ratios, DEFAULT, base)]
        parts.append(slope(ratios, DEFAULT, base))
        parts += drawn("ratio", out, charts.ratios(ratios, DEFAULT, base))
    return text(parts, [claim.verdict(found) for claim in cpu_claims(shown.settings)], records)


def length_section(lengths: dict[int, Rows], rows: list[str]) -> list[str]:
    """The section of the sweep by length: three tables by T."""
    trained = [row for row in rows if row != FORWARD]
    figures = [("Step s", rows, "step", ".2f", 1), ("Peak MB", trained, "peak", ".0f", 1e6)]
    figures.append(("Loss", rows, "loss", ".3f", 1))
    tables = [f"{name}:\n\n{sweep_table(lengths, 'T', which, *how)}" for name, which, *how in figures]
    return ["### By length", "One sequence.", *tables]


def drawn(name: str, out: Path, figure: Any) -> list[str]:
    """Save the plot beside the report; return the Markdown that shows it."""
    charts.save(figure, out / f"{name}.svg")
    return [f"![{name}]({name}.svg)"]


def text(parts: list[str], verdicts: list[str], records: list[Result]) -> str:
    """A report: its parts, claims, notes and machine."""
    print(*verdicts, sep="\n")
    claims = "\n".join(f"- {verdict}" for verdict in verdicts)
    where = "\n".join(f"- `{line}`" for line in machines(records))
    return "\n\n".join([*parts, "### Claims", claims, "### Notes", CAVEATS, LOSS, "### Machine", where]) + "\n"


def write(report: str, out: Path, page: Path | None, name: str) -> None:
    """Write `report.md`, and the same text between the markers of the page."""
    (out / "report.md").write_text(report)
    if page:
        begin, end = (f"<!-- {name}: {words} -->" for words in (f"written by benchmarks/{name}.py --report", "end"))
        shown = re.sub(r"\]\((\w+\.svg)\)", rf"](../benchmarks/results/{name}/\1)", report).replace(
            "../../../docs/", ""
        )
        write_table(page, shown, begin, end)


def gpu(records: list[Result], base: Setting, lengths: list[Setting], rows: list[str], out: Path) -> str:
    """The report of the GPU suite; its plots go to `out`."""
    found = summaries(records)
    tables = {s: found[s] for s in dict.fromkeys([base, *found]) if s in found and s not in lengths}
    sweep = {s.length: found[s] for s in lengths if s in found}
    parts = [section(s, rows, GPU) for s, rows in tables.items()]
    parts += drawn("steps", out, charts.steps(tables)) if tables else []
    if len(sweep) > 1:
        parts += [*length_section(sweep, rows), *drawn("length", out, charts.lengths(sweep, rows))]
    parts += ["### Seek and ditch", split_table(found), "### Longest sequence that fits", longest_table(records)]
    return text(parts, [claim.verdict(found) for claim in gpu_claims(base)], records)


def split_table(found: dict[Setting, Rows]) -> str:
    """Step time with one kept token (seek), the time that kept rows add (ditch), and F + 3rF if F was measured."""
    lines = []
    for setting, rows in found.items():
        if all("step" in rows.get(row, {}) for row in (DEFAULT, SEEK)):
            whole, seek = rows[DEFAULT]["step"], rows[SEEK]["step"]
            forward = rows.get(FORWARD, {}).get("step")
            model = f"{forward * (1 + 3 * setting.keep_ratio):.3f}" if forward else ""
            lines.append([str(setting), f"{whole:.3f}", f"{seek:.3f}", f"{whole - seek:.3f}", model])
    return table(["", "step s", "seek s", "ditch s", "F + 3rF s"], lines)


def longest_table(records: list[Result]) -> str:
    """By model, row and card: the longest length that fitted, and the shortest that did not."""
    asked = [record for record in records if record["limit"]]
    cards = sorted({record["limit"] for record in asked})
    lines: dict[tuple[Setting, str], dict[float, str]] = {}
    for one in {(replace(Setting(**record["setting"]), length=0), record["row"]): 0 for record in asked}:
        mine = [r for r in asked if (replace(Setting(**r["setting"]), length=0), r["row"]) == one]
        lines[one] = {card: bracket(mine, card) for card in cards}
    names = [f"{card:g} GiB" for card in cards]
    rows = [[f"{s.shape}, B={s.batch}, {s.training}", row, *by.values()] for (s, row), by in lines.items()]
    return table(["", "row", *names], rows)


def bracket(records: list[Result], card: float) -> str:
    """The answer for a card as `24576 (28672 does not)`, from all probes that apply to it."""
    good = [r["setting"]["length"] for r in records if "used" in r and r["used"] <= room(card)]
    bad = [r["setting"]["length"] for r in records if r.get("memory") and r["limit"] >= card]
    bad += [r["setting"]["length"] for r in records if "used" in r and r["used"] > room(card)]
    return f"{max(good, default=0)}" + (f" ({min(bad)} does not)" if bad else "")
