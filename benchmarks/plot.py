"""Table and plot of the quality study, made from its results: `python benchmarks/quality.py --report`."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

SETTINGS = {"full": "all parameters", "lora": "LoRA"}
COLOURS = {
    "all": "black",
    "checkpointing": "grey",
    "tokenseek": "tab:red",
    "attention": "tab:orange",
    "gradient": "tab:purple",
    "loss": "tab:green",
    "random": "tab:blue",
    "strided": "tab:cyan",
    "first": "tab:olive",
    "last": "tab:pink",
    "paper": "tab:brown",
}
DASHES = {"": "-", "sample": "--", "labelled": "-.", "kv": ":", "sample-kv": (0, (1, 1))}
MARKERS = {"": "o", "sample": "s", "labelled": "^", "kv": "D", "sample-kv": "P"}
BEGIN, END = "<!-- table: written by benchmarks/quality.py --report -->", "<!-- end of the table -->"
LABEL = "held-out loss"


@dataclass(frozen=True)
class Line:
    """One configuration: `losses[i]` are the losses of all seeds after `steps[i]`; `ratio`: step time / all tokens'."""

    setting: str
    method: str
    kept: int
    steps: list[int]
    losses: list[tuple[float, ...]]
    saved: int
    ratio: float | None

    @property
    def scorer(self) -> str:
        return self.method.split("-")[0]

    @property
    def variant(self) -> str:
        return self.method.partition("-")[2]

    @property
    def means(self) -> list[float]:
        return [statistics.mean(seeds) for seeds in self.losses]

    @property
    def spreads(self) -> list[float]:
        """Standard deviation over seeds; 0 for a single seed."""
        return [statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in self.losses]

    @property
    def label(self) -> str:
        """The name without the ratio, which the title of the panel gives."""
        return self.method.replace("-", ", ", 1).replace("-", " + ")

    def after(self, steps: float) -> float:
        """Mean loss after this many steps, interpolated linearly between measurements."""
        right = next(i for i, step in enumerate(self.steps) if step >= steps)
        if self.steps[right] == steps:
            return self.means[right]
        left = right - 1
        share = (steps - self.steps[left]) / (self.steps[right] - self.steps[left])
        return self.means[left] + share * (self.means[right] - self.means[left])


def read(results: Path) -> list[Line]:
    """All configurations with results, which must be of one study."""
    lines, studies = [], set()
    for path in sorted(results.glob("*.json")):
        if path.name.endswith(".time.json") or path.name == "sweep.json":
            continue
        result = json.loads(path.read_text())
        studies.add(json.dumps([result["study"], result["machine"]["torch"]]))
        lines.append(line_of(result, path.with_suffix(".time.json")))
    if len(studies) > 1:
        raise SystemExit(f"{results} holds results of {len(studies)} different studies. Keep one study per folder.")
    return sorted(lines, key=lambda line: (line.setting, list(COLOURS).index(line.scorer), line.variant, line.kept))


def line_of(result: dict[str, Any], time: Path) -> Line:
    """A result, with its step time if measured."""
    run = result["run"]
    return Line(
        run["setting"],
        run["method"],
        run["kept"],
        [0, *result["study"]["evaluate"]],
        list(zip(*result["held_out"], strict=True)),
        sum(result["saved"].values()),
        1.0 if run["method"] == "all" else json.loads(time.read_text())["ratio"] if time.exists() else None,
    )


def table(lines: list[Line]) -> str:
    """One table for each setting."""
    parts = []
    for setting, title in SETTINGS.items():
        if mine := [line for line in lines if line.setting == setting]:
            parts.append(f"### {title[0].upper()}{title[1:]}\n\n" + "\n".join(rows(mine)) + "\n")
    return "\n".join(parts)


def rows(lines: list[Line]) -> list[str]:
    """Head and rows of one table; all tokens are the reference."""
    every = next(line for line in lines if line.method == "all")
    last = every.steps[-1]
    heads = [f"at the time of {last // share} steps of all" for share in (4, 2)]
    head = ["method", "kept", f"after {last} steps", "change", "step time", "saved bytes", *heads]
    cells = [row(line, every) for line in lines]
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells]]


def row(line: Line, every: Line) -> list[str]:
    """The cells of one configuration."""
    last = every.steps[-1]
    return [
        line.label,
        f"{line.kept} %",
        f"{line.means[-1]:.3f} ± {line.spreads[-1]:.3f}",
        f"{line.means[-1] - line.means[0]:+.3f}",
        f"{line.ratio:.2f}" if line.ratio else "",
        f"{line.saved / every.saved:.2f}",
        *(at_time(line, last / share) for share in (4, 2)),
    ]


def at_time(line: Line, steps: float) -> str:
    """Loss after the time in which training on all tokens makes `steps` steps.

    If the run ends earlier, it is the final loss, with the fraction of that time.
    """
    if line.ratio is None:
        return ""
    own, last = steps / line.ratio, line.steps[-1]
    return f"{line.after(min(own, last)):.3f}" + f" (in {last / own:.0%})" * (own > last)


def write_table(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Write the text between the markers of the page."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}")


def style(line: Line) -> dict[str, Any]:
    """Colour by scorer and dashes by variant; the line of all tokens is thick."""
    thin = line.scorer in ("strided", "first", "last")
    width = 2.2 if line.scorer == "all" else 0.8 if thin else 1.4
    return {"color": COLOURS[line.scorer], "linestyle": DASHES[line.variant], "linewidth": width}


def draw_curves(axes: Axes, lines: list[Line], at: Callable[[Line], Iterable[float]]) -> None:
    """Plot means over seeds with standard deviations."""
    for line in lines:
        x, low = list(at(line)), [m - s for m, s in zip(line.means, line.spreads, strict=True)]
        high = [m + s for m, s in zip(line.means, line.spreads, strict=True)]
        axes.plot(x, line.means, label=line.label, **style(line))
        axes.fill_between(x, low, high, color=COLOURS[line.scorer], alpha=0.1, linewidth=0)


def draw_ratios(axes: Axes, lines: list[Line]) -> None:
    """Plot the final loss by ratio for methods with several ratios, with all tokens at the right."""
    every = next(line for line in lines if line.method == "all")
    for method in dict.fromkeys(line.method for line in lines):
        mine = [line for line in lines if line.method == method]
        if len(mine) > 1:
            mine.append(every)
            x, y, error = [m.kept for m in mine], [m.means[-1] for m in mine], [m.spreads[-1] for m in mine]
            axes.errorbar(x, y, error, capsize=2, **style(mine[0]))
    axes.set_xscale("log")
    axes.set_xticks([5, 10, 20, 40, 100], ["5", "10", "20", "40", "100"])
    axes.minorticks_off()


def draw_pareto(axes: Axes, lines: list[Line]) -> Any:
    """Plot time, memory and loss of each configuration, with a ring around those that no other dominates."""
    every = next(line for line in lines if line.method == "all")
    timed = [line for line in lines if line.ratio]
    points = [(line.ratio or 0.0, line.saved / every.saved, line.means[-1]) for line in timed]
    worst = every.means[0]
    for line, (x, y, loss) in zip(timed, points, strict=True):
        edge = "black" if not any(dominates(other, (x, y, loss)) for other in points) else "none"
        shown = axes.scatter(
            x,
            y,
            c=[loss],
            vmin=every.means[-1],
            vmax=worst,
            cmap="viridis_r",
            marker=MARKERS[line.variant],
            edgecolors=edge,
            s=42,
        )
        if line.method in ("all", "checkpointing"):
            axes.annotate(line.method, (x, y), textcoords="offset points", xytext=(-4, 7), ha="right", fontsize=7)
    axes.set_yscale("log")
    return shown if timed else None


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """True if `a` is at least as good as `b` in all values, and not equal."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def figure(lines: list[Line], seconds: float) -> Any:
    """A row of panels for each setting: loss by steps, by time and by ratio, and the Pareto front."""
    found = [setting for setting in SETTINGS if any(line.setting == setting for line in lines)]
    canvas, grid = plt.subplots(len(found), 4, figsize=(19, 5 * len(found)), squeeze=False, layout="constrained")
    for setting, axes in zip(found, grid, strict=True):
        mine = [line for line in lines if line.setting == setting]
        shown = [line for line in mine if line.kept in (10, 100)]
        draw_curves(axes[0], shown, lambda line: line.steps)
        timed = [line for line in shown if line.ratio]
        draw_curves(axes[1], timed, lambda line: [step * (line.ratio or math.nan) * seconds for step in line.steps])
        draw_ratios(axes[2], mine)
        if (points := draw_pareto(axes[3], mine)) is not None:
            canvas.colorbar(points, ax=axes[3], label=f"{LABEL} after the last step")
        name_panels(axes, setting, mine)
    handles, labels = grid[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=9)
    return canvas


def name_panels(axes: list[Axes], setting: str, lines: list[Line]) -> None:
    """Set titles, axes and limits; losses far worse than without fine-tuning are cut off."""
    start, best = lines[0].means[0], min(min(line.means) for line in lines)
    titles = ("steps, 10 % kept", "seconds, 10 % kept", "% of the tokens kept")
    for panel, name in zip(axes[:3], titles, strict=True):
        panel.set(xlabel=name, ylabel=LABEL, title=SETTINGS[setting])
        panel.set_ylim(best - 0.05 * (start - best), start + 0.6 * (start - best))
        panel.axhline(start, color="lightgrey", linewidth=0.8, zorder=0)
    axes[3].set(xlabel="step time / all tokens", ylabel="saved bytes / all tokens", title=SETTINGS[setting])


def seconds_of_all(results: Path) -> float:
    """Median step time on all tokens over all timings; nan without any."""
    found = [json.loads(path.read_text())["all"] for path in sorted(results.glob("*.time.json"))]
    return statistics.median(found) if found else math.nan


def report(results: Path, docs: Path) -> int:
    """Write the table of `docs/when-to-use.md` and `docs/quality.svg`; the same results give the same bytes."""
    lines = read(results)
    if not any(line.method == "all" for line in lines):
        raise SystemExit(f"{results} holds no result on all tokens to compare with. Run the configuration `full-all`.")
    mpl.rcParams.update({"svg.hashsalt": "tokenseek", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25})
    canvas = figure(lines, seconds_of_all(results))
    canvas.savefig(docs / "quality.svg", metadata={"Date": None})
    write_table(docs / "when-to-use.md", table(lines))
    return 0
