"""Plots of the suites: time and memory of each row, by length, and by keep_ratio compared with the model F + 3rF."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from peers import COMPILE, FORWARD
from shapes import SHAPES, Setting

Rows = dict[str, dict[str, Any]]
COLOURS = ["black", "grey", "tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan"]
STYLE = {"svg.hashsalt": "tokenseek", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25}


def canvas(rows: int, columns: int, height: float = 4) -> tuple[Any, Any]:
    """A figure with panels. Its output is deterministic: the same data give the same bytes."""
    mpl.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(6 * columns, height * rows), squeeze=False, layout="constrained")


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def colour(row: str, rows: list[str]) -> str:
    """The colour of a row; tokenseek is red."""
    return "tab:red" if row == "tokenseek" else COLOURS[rows.index(row) % len(COLOURS)]


def steps(settings: dict[Setting, Rows]) -> Any:
    """Step time and peak memory of each row, with one line of panels per setting."""
    figure, grid = canvas(len(settings), 2)
    for (setting, rows), axes in zip(settings.items(), grid, strict=True):
        done = {row: result for row, result in rows.items() if "failed" not in result}
        bars(axes[0], {row: result["step"] for row, result in done.items()}, "seconds a step", setting)
        bars(axes[1], {row: result["peak"] / 1e6 for row, result in done.items()}, "peak MB above the model", setting)
    return figure


def bars(axes: Axes, values: dict[str, float], label: str, setting: Setting) -> None:
    """A horizontal bar chart with the first row on top."""
    names = list(values)
    drawn = axes.barh(names, list(values.values()), color=[colour(name, names) for name in names])
    axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=label, title=str(setting))


def lengths(sweep: dict[int, Rows], rows: list[str]) -> Any:
    """Step time and peak memory by T, and the model F + 3rF computed from the measured forward."""
    figure, grid = canvas(1, 2)
    for axes, key, unit, label in [(grid[0][0], "step", 1, "seconds a step"), (grid[0][1], "peak", 1e6, "peak MB")]:
        for row in rows if key == "step" else [row for row in rows if row != FORWARD]:
            points = {T: found[row][key] / unit for T, found in sweep.items() if key in found.get(row, {})}
            axes.plot(list(points), list(points.values()), marker="o", label=row, color=colour(row, rows))
        axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label)
        axes.set_xticks(list(sweep), [str(T) for T in sweep])
        axes.minorticks_off()
    forwards = {T: found[FORWARD] for T, found in sweep.items() if "step" in found.get(FORWARD, {})}
    model = [(1 + 3 * one["setting"]["keep_ratio"]) * one["step"] for one in forwards.values()]
    grid[0][0].plot(list(forwards), model, linestyle="--", color="tab:red", label="F + 3rF")
    grid[0][0].legend(fontsize=8)
    return figure


def ratios(sweep: dict[float, Rows], row: str, base: Rows) -> Any:
    """By keep_ratio: step time with F + 3rF, saved bytes with keys/values + r x those of plain training, the peak."""
    figure, grid = canvas(1, 3)
    points = {r: found[row] for r, found in sweep.items() if "step" in found.get(row, {})}
    by_forward = {r: one["step"] / base[FORWARD]["step"] for r, one in points.items()}
    line_and_points(grid[0][0], by_forward, {r: 1 + 3 * r for r in points}, "step / forward", "F + 3rF")
    grid[0][0].axhline(base[COMPILE]["step"] / base[FORWARD]["step"], color="grey", label=COMPILE)
    saved = {r: one["saved"] / 1e6 for r, one in points.items()}
    model = {r: kept_bytes(one["setting"], r, base) / 1e6 for r, one in points.items()}
    line_and_points(grid[0][1], saved, model, "saved MB", "keys/values + r x torch.compile's")
    grid[0][1].axhline(base[COMPILE]["saved"] / 1e6, color="grey", label=COMPILE)
    grid[0][2].plot(list(points), [one["peak"] / 1e6 for one in points.values()], "o-", color="tab:red", label=row)
    grid[0][2].axhline(base[COMPILE]["peak"] / 1e6, color="grey", label=COMPILE)
    grid[0][2].set(xlabel="keep_ratio", ylabel="peak MB")
    for axes in grid[0]:
        axes.legend(fontsize=8)
    return figure


def kept_bytes(setting: dict[str, Any], r: float, base: Rows) -> float:
    """Bytes of the keys and values of all tokens, plus r times the bytes that plain training saves."""
    return keys_and_values(Setting(**setting)) + r * base[COMPILE]["saved"]


def keys_and_values(setting: Setting) -> int:
    """Bytes of the keys and values of all layers, before heads are repeated."""
    shape = SHAPES[setting.shape]
    width = shape.hidden // shape.heads * shape.kv_heads
    return 2 * shape.layers * setting.batch * setting.length * width * (4 if setting.dtype == "float32" else 2)


def line_and_points(axes: Axes, points: dict[float, float], model: dict[float, float], label: str, name: str) -> None:
    """Measured points, and the line of the model."""
    axes.plot(list(points), list(points.values()), "o", color="tab:red", label="measured")
    axes.plot(list(model), list(model.values()), "--", color="black", label=name)
    axes.set(xlabel="keep_ratio", ylabel=label)
