"""What one training step costs: time, peak memory, saved bytes, compile time. `make bench` or

    python benchmarks/step.py --setting 1 --rounds 3 --steps 5 --out out/bench

Every row runs in its own process, in turns (all rows, then all rows again), from the same weights and ids. A step is
forward + backward (one row: the forward alone, without gradient). Peak memory is resident memory above model and gradients, with and without the allocator's slack. The
first step is reported from round one, with an empty Inductor cache; later rounds find their kernels in it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import measure
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from training import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from tokenseek_fx import Config

Result = dict[str, Any]
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Setting:
    """Shape of the model and of the batch."""

    length: int
    batch: int
    vocab: int
    layers: int = 8

    def model(self) -> LlamaForCausalLM:
        """Random weights, the same for every row."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
        positions = {"max_position_embeddings": self.length, "use_cache": False}
        return LlamaForCausalLM(LlamaConfig(vocab_size=self.vocab, **sizes, **heads, **positions)).train()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Random ids, every token labelled."""
        ids = torch.randint(self.vocab, (self.batch, self.length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "labels": ids.clone()}

    def __str__(self) -> str:
        return f"T={self.length} B={self.batch} vocab {self.vocab}, {self.layers} layers, hidden 512, float32"


SETTINGS = {"1": Setting(length=1024, batch=4, vocab=4096), "2": Setting(length=2048, batch=2, vocab=32000)}


def half_budget(model: nn.Module) -> None:
    """torch.compile, its partitioner told to save half."""
    torch._functorch.config.activation_memory_budget = 0.5
    model.compile()


def tokenseek(**options: Any) -> Callable[[nn.Module], None]:
    """Train on a tenth of the tokens, never building their logits unless told to."""
    options = {"keep_ratio": 0.1, "logits": "drop", "strict": True, **options}
    return lambda model: model.compile(backend="tokenseek", options=options)


FORWARD, DEFAULT = "torch.compile, forward alone", "tokenseek"
RANDOM, WHOLE = "tokenseek, random rows", "tokenseek, random rows, full loss"
PAPER = {name: value for name, value in vars(Config.paper()).items() if value != getattr(Config(), name)}
ROWS: dict[str, Callable[[nn.Module], object]] = {
    "eager": lambda model: None,
    "gradient checkpointing": checkpoint,
    "torch.compile": lambda model: model.compile(),
    "torch.compile, memory budget 0.5": half_budget,
    FORWARD: lambda model: model.compile(),
    DEFAULT: tokenseek(),
    "tokenseek, logits keep": tokenseek(logits="keep"),
    "tokenseek, the paper's recipe": tokenseek(**PAPER),
    "tokenseek, attention": tokenseek(scorer="attention", report_loss="kept"),
    RANDOM: tokenseek(scorer="random", select="topk", report_loss="kept"),
    WHOLE: tokenseek(scorer="random", select="topk", report_loss="full"),
}
CAVEAT = (
    "activation_memory_budget: its peak is not monotone in the budget (pytorch #197838), and dropout is recomputed "
    "with fresh randomness (#190758). The loss of random rows and of attention is the mean over the kept tokens."
)


def timed_step(model: nn.Module, inputs: dict[str, torch.Tensor], backward: bool) -> tuple[float, float]:
    """Seconds of forward (+ backward), and the loss; gradients stay allocated."""
    model.zero_grad(set_to_none=False)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        loss = model(**inputs).loss
    if backward:
        loss.backward()
    return time.perf_counter() - start, loss.item()


def work(row: str, setting: Setting, steps: int) -> Result:
    """One row in this process."""
    model, inputs = setting.model(), setting.inputs()
    ROWS[row](model)
    trains = row != FORWARD
    first, loss = timed_step(model, inputs, trains)
    with measure.PeakMemory() as peak:
        seconds = [timed_step(model, inputs, trains)[0] for _ in range(steps)]
    nothing = {"activations": 0, "logits": 0}
    saved = measure.saved_bytes(model, inputs, setting.vocab) if trains else nothing
    return {"first": first, "loss": loss, "seconds": seconds, "peak": peak.bytes, **saved}


# glibc keeps freed memory for itself, by an amount that depends on the order of sizes more than on what is in use. With a
# fixed threshold tensors are mapped and unmapped one by one, and resident memory is memory in use. It slows every row, so
# times are taken without it.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def spawn(row: str, setting: Setting, steps: int, cache: Path, environment: dict[str, str]) -> Result:
    """The same in a process of its own; its errors are part of the result."""
    command = [sys.executable, __file__, "--worker", json.dumps([row, asdict(setting), steps])]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stderr.splitlines():
        if done.returncode or "Warning" in line:
            console.print(line, style="dim", markup=False, highlight=False)
    return {"failed": done.returncode} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def rounds(rows: list[str], setting: Setting, count: int, steps: int) -> dict[str, list[Result]]:
    """Every row once, then every row again: a drift of the machine meets all rows alike. A last round for memory."""
    results: dict[str, list[Result]] = {row: [] for row in rows}
    names = [*(f"round {number + 1}/{count}" for number in range(count)), "memory"]
    with tempfile.TemporaryDirectory() as caches:
        for name in names:
            memory = name == "memory"
            for index, row in enumerate(rows):
                console.print(f"{name}: {row} ...", end=" ", highlight=False)
                cache, environment = Path(caches) / str(index), EXACT_MEMORY if memory else {}
                results[row].append(spawn(row, setting, 2 if memory else steps, cache, environment))
                console.print(describe(results[row][-1]), highlight=False)
    return results


def describe(result: Result) -> str:
    """One process in half a line."""
    if "failed" in result:
        return f"failed, exit status {result['failed']}"
    median = statistics.median(result["seconds"])
    return f"first step {result['first']:.1f} s, then {median:.2f} s, peak {result['peak'] / 1e6:.0f} MB"


def summary(runs: list[Result]) -> Result:
    """Medians over all rounds; first step, loss and saved bytes from round one, memory in use from the last."""
    if failed := [run for run in runs if "failed" in run]:
        return failed[0]
    *timed, memory = runs
    seconds = [value for run in timed for value in run["seconds"]]
    medians = {"step": statistics.median(seconds), "resident": statistics.median(run["peak"] for run in timed)}
    medians["peak"] = memory["peak"]
    saved = {"saved": runs[0]["activations"] + runs[0]["logits"]}
    return runs[0] | medians | saved | {"fastest": min(seconds), "slowest": max(seconds)}


# heading -> (value, its format, divisor, the row it is compared with)
COLUMNS: dict[str, tuple[str, str, float, str | None]] = {
    "step s": ("step", ".2f", 1, "torch.compile"),
    "peak MB": ("peak", ".0f", 1e6, "eager"),
    "with allocator slack": ("resident", ".0f", 1e6, "eager"),
    "saved MB": ("saved", ".1f", 1e6, "torch.compile"),
    "of it logits": ("logits", ".1f", 1e6, None),
    "first step s": ("first", ".1f", 1, "torch.compile"),
    "loss": ("loss", ".3f", 1, None),
}


def cells(result: Result, every: dict[str, Result]) -> list[str]:
    """The figures of one row, each with its ratio where it has one."""
    if "failed" in result:
        return [f"failed ({result['failed']})"] + [""] * (len(COLUMNS) - 1)
    return [
        cell(result[key], every.get(other or "", {}).get(key), style, by) for key, style, by, other in COLUMNS.values()
    ]


def cell(value: float, other: float | None, style: str, divisor: float) -> str:
    """`1.84 (0.37x)`."""
    text = format(value / divisor, style)
    return f"{text} ({value / other:.2f}x)" if other else text


def headings() -> list[str]:
    """Column heads that name what their ratio refers to."""
    return [f"{name} (/ {other})" if other else name for name, (*_, other) in COLUMNS.items()]


def show(setting: Setting, every: dict[str, Result]) -> None:
    """The table on the terminal."""
    table = Table("row", *headings(), title=str(setting), title_justify="left")
    for row, result in every.items():
        table.add_row(row, *cells(result, every))
    console.print(table)


def markdown(setting: Setting, every: dict[str, Result]) -> str:
    """The table for a document."""
    head = ["", *headings()]
    lines = [head, ["---"] * len(head), *([row, *cells(result, every)] for row, result in every.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {setting}\n\n{table}\n\n{scoring(every)}\n"


def scoring(every: dict[str, Result]) -> str:
    """What scores cost, in forwards of the model and in bytes of the peak: beside random rows, which need no head for all
    tokens, and beside random rows whose full loss is computed too."""
    lines = []
    for row in (RANDOM, WHOLE):
        if all("step" in every.get(name, {}) for name in (DEFAULT, row, FORWARD)):
            share = (every[DEFAULT]["step"] - every[row]["step"]) / every[FORWARD]["step"]
            more = (every[DEFAULT]["peak"] - every[row]["peak"]) / 1e6
            lines.append(f"{DEFAULT} beside {row}: {share:+.2f} of a forward, {more:+.0f} MB of the peak.")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    system = {"system": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()}
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **system,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=3, help="processes per row, default 3")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per process, default 5")
    parser.add_argument(
        "--quick", action="store_true", help="does it run: two layers, a quarter of the length, one round"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for step.json and step.md")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, show, write."""
    options = arguments()
    if options.worker:
        row, setting, steps = options.worker
        print(json.dumps(work(row, Setting(**setting), steps)))
        return 0
    chosen = [SETTINGS[name] for name in SETTINGS if options.setting in (name, "all")]
    if options.quick:
        chosen = [replace(setting, length=setting.length // 4, layers=2) for setting in chosen]
        options.rounds, options.steps = 1, 2
    return report(chosen, options)


def report(chosen: list[Setting], options: argparse.Namespace) -> int:
    """Tables on the terminal, figures and tables on disk; 1 if a row failed."""
    where = machine()
    runs = {str(setting): rounds(options.rows, setting, options.rounds, options.steps) for setting in chosen}
    every = {name: {row: summary(results) for row, results in rows.items()} for name, rows in runs.items()}
    for setting in chosen:
        show(setting, every[str(setting)])
        console.print(scoring(every[str(setting)]), highlight=False)
    console.print(CAVEAT, f"{options.rounds} rounds of {options.steps} steps; {where}", sep="\n", highlight=False)
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {"machine": where, "rounds": options.rounds, "steps": options.steps, "summary": every, "runs": runs}
    (options.out / "step.json").write_text(json.dumps(figures, indent=2))
    tables = [markdown(setting, every[str(setting)]) for setting in chosen]
    (options.out / "step.md").write_text("\n".join([*tables, CAVEAT, f"\n{where}\n"]))
    return int(any("failed" in result for rows in every.values() for result in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
