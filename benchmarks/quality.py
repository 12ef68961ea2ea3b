"""The quality of training on selected tokens: held-out loss by scorer and ratio, against steps and against time.

A byte-level Llama is trained once on the sources of Python's standard library, then fine-tuned on docstring -> code
pairs from it: on all tokens, with gradient checkpointing, and with each scorer; all parameters and LoRA; several seeds.

    python benchmarks/quality.py --quick              # smoke test: four small configurations
    python benchmarks/quality.py --jobs 2             # the curves: one process per configuration
    python benchmarks/quality.py --time               # step times, on an otherwise idle machine
    python benchmarks/quality.py --report             # write table and plot to docs/ from the results, no training

Each configuration has a JSON file in `benchmarks/results/quality/`. A result with the same settings is not run again,
so the same command resumes a study that was stopped. `--only 'full-*-10'` selects configurations, `--list` lists them.
"""

import argparse
import fnmatch
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / "out/quality/cache"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import data
import measure
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from training import checkpoint, held_out_loss, step
from transformers import LlamaConfig, LlamaForCausalLM

from tokenseek_fx import Config

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "out" / "quality"  # pretrained weights and kernels: git-ignored
SETTINGS = ("full", "lora")
SCORERS = ("tokenseek", "attention", "gradient", "loss", "random", "strided", "first", "last")
RATIOS = (5, 10, 20, 40)
PLAIN = {
    "select": "topk",
    "labelled_first": 0.0,
    "kv_grad": "selected",
    "report_loss": None,
}  # unless a method says more
LEARNING_RATES = {"full": 3e-4, "lora": 1e-3}  # the best of --sweep, on all tokens
SWEEP = {"full": (1e-4, 3e-4, 6e-4, 1e-3), "lora": (5e-4, 1e-3, 2e-3, 4e-3)}


@dataclass(frozen=True)
class Study:
    """The settings that all configurations share."""

    layers: int = 4
    hidden: int = 128
    length: int = 256
    batch: int = 4
    evaluate: tuple[int, ...] = (10, 20, 40, 80)
    seeds: int = 3
    held_out: int = 48
    shortest: int = 128
    rank: int = 8
    pretrain: int = 800

    def model(self) -> LlamaForCausalLM:
        """A Llama with 0.86 M parameters and two query heads per key/value head."""
        sizes = {"hidden_size": self.hidden, "intermediate_size": 3 * self.hidden, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": self.length}
        return LlamaForCausalLM(LlamaConfig(vocab_size=data.BYTE_VOCAB, use_cache=False, **sizes, **heads)).train()


QUICK = Study(evaluate=(2, 4), seeds=1, held_out=8)
QUICK_RUNS = ("full-all", "full-tokenseek-10", "lora-all", "lora-random-10")


@dataclass(frozen=True)
class Run:
    """One configuration. `options`: those of the backend; None: all tokens. `kept`: percent of the tokens."""

    setting: str
    method: str
    options: dict[str, Any] | None
    kept: int = 100

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.method}" + (f"-{self.kept}" if self.options else "")

    def compile(self, model: nn.Module) -> None:
        """Prepare the model for the method; evaluation uses `model.forward`, which stays eager."""
        if self.method == "checkpointing":
            checkpoint(model)
        if self.options is None:
            model.compile(dynamic=False)
        else:
            model.compile(backend="tokenseek", dynamic=False, options=self.options)


def variants() -> Iterator[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """For each method: (its name, its options, its ratios in percent)."""
    for scorer in SCORERS:
        yield scorer, {"scorer": scorer}, RATIOS
    for scorer in ("tokenseek", "gradient", "loss", "random"):
        ratios = RATIOS if scorer in ("gradient", "loss") else (10,)  # the best at 10 %
        yield f"{scorer}-sample", {"scorer": scorer, "select": "sample"}, ratios
    for scorer in ("tokenseek", "random", "loss"):
        yield f"{scorer}-labelled", {"scorer": scorer, "labelled_first": 1.0}, (10,)
    yield "random-kv", {"scorer": "random", "kv_grad": "all"}, (10,)
    for scorer in ("tokenseek", "gradient", "loss"):
        yield f"{scorer}-sample-kv", {"scorer": scorer, "select": "sample", "kv_grad": "all"}, (10,)
    yield "paper", vars(Config.paper()), (10,)


def study_runs() -> list[Run]:
    """All configurations; those on all tokens come first."""
    runs = [Run(setting, method, None) for setting in SETTINGS for method in ("all", "checkpointing")]
    for setting in SETTINGS:
        for method, options, ratios in variants():
            for kept in ratios:
                common = {"keep_ratio": kept / 100, "logits": "drop", "strict": True}
                runs.append(Run(setting, method, PLAIN | options | common, kept))
    return runs


def pairs(study: Study) -> tuple[data.Batch, data.Batch]:
    """(training pairs, held-out pairs) of at least `study.shortest` bytes; whole files are held out."""
    tokens = data.byte_tokens()
    long = [
        [pair for pair in data.library_pairs(sources, tokens, study.length) if size(pair) >= study.shortest]
        for sources in data.library_files()
    ]
    return data.encode(long[0], tokens, study.length), data.encode(long[1][: study.held_out], tokens, study.length)


def size(pair: data.Pair) -> int:
    """The number of bytes of prompt and answer."""
    return len("".join(pair).encode())


def prepare(study: Study) -> None:
    """Write pairs and pretrained weights to disk, if missing. Pretraining reads the training files as running text."""
    WORK.mkdir(parents=True, exist_ok=True)
    torch.save(pairs(study), WORK / "pairs.pt")
    if (WORK / "model.pt").exists():
        return
    print(f"pretraining, {study.pretrain} steps ...", flush=True)
    torch.manual_seed(0)
    text = data.windows(data.library_files()[0], data.byte_tokens(), study.length)
    model = study.model()
    model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=study.pretrain)
    for number in range(study.pretrain):
        loss = step(model, data.draw(text, 2 * study.batch, number), optimizer)
        schedule.step()
    print(f"pretrained, training loss {loss:.3f}", flush=True)
    torch.save(model.state_dict(), WORK / "model.pt")


class Learner:
    """A model that is compiled once, and reset to the pretrained weights for each seed."""

    def __init__(self, study: Study, run: Run):
        self.study, self.run = study, run
        self.pairs, self.held_out = torch.load(WORK / "pairs.pt")
        self.model = study.model()
        self.model.load_state_dict(torch.load(WORK / "model.pt"))
        if run.setting == "lora":
            lora = LoraConfig(r=study.rank, lora_alpha=2 * study.rank, target_modules="all-linear")
            inject_adapter_in_model(lora, self.model)
        self.trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.start = {name: value.detach().clone() for name, value in self.trained.items()}
        run.compile(self.model)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Restore the pretrained weights in place; the seed determines LoRA weights, batches and noise."""
        torch.manual_seed(seed)
        for name, value in self.trained.items():
            value.copy_(self.start[name])
            if "lora_A" in name:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.trained.values(), lr=lr)

    def batch(self, seed: int, number: int) -> data.Batch:
        """The batch of a step, the same for all configurations."""
        return data.draw(self.pairs, self.study.batch, 100_000 * seed + number)

    def curve(self, seed: int, lr: float) -> list[float]:
        """Held-out loss before training, then at the steps of `study.evaluate`."""
        self.reset(seed)
        optimizer, losses = self.optimizer(lr), [held_out_loss(self.model, self.held_out, batch=32)]
        for number in range(1, self.study.evaluate[-1] + 1):
            step(self.model, self.batch(seed, number), optimizer)
            if number in self.study.evaluate:
                losses.append(held_out_loss(self.model, self.held_out, batch=32))
        return losses


def settings(study: Study, run: Run, lr: float) -> Result:
    """All that a result depends on. A result with the same settings is not run again."""
    return json.loads(json.dumps({"study": asdict(study), "run": asdict(run), "lr": lr}))


def train(study: Study, run: Run, lr: float) -> Result:
    """Train one configuration in this process."""
    learner, start = Learner(study, run), time.perf_counter()
    learner.reset(0)
    step(learner.model, learner.batch(0, 0), learner.optimizer(lr))
    first = time.perf_counter() - start
    curves = [learner.curve(seed, lr) for seed in range(study.seeds)]
    saved = measure.saved_bytes(learner.model, learner.batch(0, 0), data.BYTE_VOCAB)
    seconds = {"first_step": first, "all": time.perf_counter() - start, "cpu": time.process_time()}
    return settings(study, run, lr) | {"held_out": curves, "saved": saved, "seconds": seconds, "machine": machine()}


def machine() -> Result:
    """The machine and versions behind the figures."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def step_seconds(learner: Learner, steps: int) -> list[float]:
    """Seconds of whole steps, after two steps for warm-up."""
    optimizer, batches = learner.optimizer(1e-4), [learner.batch(0, number) for number in range(steps + 2)]
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        step(learner.model, batch, optimizer)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def measure_times(study: Study, runs: list[Run], results: Path, rounds: int = 3, steps: int = 10) -> int:
    """Time each configuration in turns with all tokens, in this process; return the number that failed."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    yardstick, failed = Learner(study, Run(runs[0].setting, "all", None)), 0
    for run in runs:
        try:
            learner = Learner(study, run)
            turns = [(step_seconds(yardstick, steps), step_seconds(learner, steps)) for _ in range(rounds)]
        except Exception:  # go on with the others
            print(f"{run.name} failed", traceback.format_exc(limit=-3), sep="\n", flush=True)
            failed += 1
            continue
        measured = in_turns(turns) | {"load": os.getloadavg(), "machine": machine()}
        write(results / f"{run.name}.time.json", {"study": asdict(study), **measured})
        print("{name}: {step:.3f} s per step, {ratio:.2f} of all tokens".format(name=run.name, **measured), flush=True)
    return failed


def in_turns(turns: list[tuple[list[float], list[float]]]) -> Result:
    """Medians over all turns, and the ratio of each turn."""
    every, own = ([seconds for turn in turns for seconds in turn[which]] for which in (0, 1))
    ratios = [statistics.median(own) / statistics.median(every) for every, own in turns]
    return {
        "step": statistics.median(own),
        "all": statistics.median(every),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def write(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def is_done(path: Path, wanted: Result) -> bool:
    """True if a result with these settings is on disk."""
    return path.exists() and wanted.items() <= json.loads(path.read_text()).items()


def spawn(run: Run, options: argparse.Namespace) -> bool:
    """Train one configuration in a process of its own; True if it succeeded."""
    flags = ["--worker", run.name, "--out", str(options.out)] + ["--quick"] * options.quick
    flags += ["--lr", str(options.lr)] if options.lr else []
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    said = done.stdout.strip() if done.returncode == 0 else "FAILED\n" + done.stderr[-1500:]
    print(f"{run.name}: {time.perf_counter() - start:.0f} s, {said}", flush=True)
    return done.returncode == 0


def work(run: Run, study: Study, options: argparse.Namespace) -> int:
    """Train one configuration in this process, and write its result."""
    result = train(study, run, options.lr or LEARNING_RATES[run.setting])
    write(options.out / f"{run.name}.json", result)
    ends = [curve[-1] for curve in result["held_out"]]
    print(f"held-out {result['held_out'][0][0]:.3f} -> {statistics.mean(ends):.3f}, {min(ends):.3f}-{max(ends):.3f}")
    return 0


def sweep(study: Study, out: Path) -> int:
    """Write the held-out loss on all tokens by learning rate, for one seed."""
    study, found = replace(study, seeds=1), {}
    for setting, rates in SWEEP.items():
        learner = Learner(study, Run(setting, "all", None))
        found[setting] = {f"{lr:g}": learner.curve(0, lr) for lr in rates}
        print(setting, {lr: round(losses[-1], 4) for lr, losses in found[setting].items()}, flush=True)
    write(out / "sweep.json", {"study": asdict(study), "held_out": found})
    return 0


def curves(study: Study, runs: list[Run], options: argparse.Namespace) -> int:
    """Train configurations without a result on disk, `--jobs` processes at a time; return 1 if one failed."""
    wanted = {run.name: settings(study, run, options.lr or LEARNING_RATES[run.setting]) for run in runs}
    left = [run for run in runs if not is_done(options.out / f"{run.name}.json", wanted[run.name])]
    print(f"{len(runs) - len(left)} of {len(runs)} configurations have results already", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        return int(not all(list(pool.map(lambda run: spawn(run, options), left))))


def times(runs: list[Run], options: argparse.Namespace) -> int:
    """Measure missing step times: one process per setting, `--jobs` at a time; return 1 if one failed."""
    runs = [run for run in runs if run.method != "all"]  # the reference of the others
    left = [run for run in runs if not (options.out / f"{run.name}.time.json").exists()]
    print(f"{len(runs) - len(left)} of {len(runs)} step times have been measured already", flush=True)
    named = [[run.name for run in left if run.setting == setting] for setting in SETTINGS]
    command = [sys.executable, __file__, "--time", "--out", str(options.out), "--worker"]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(lambda names: subprocess.run([*command, *names], check=False), filter(None, named)))
    return int(any(process.returncode for process in done))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each; default 1")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="configurations by name, as 'full-*-10'"
    )
    parser.add_argument("--list", action="store_true", help="list the names of the configurations")
    parser.add_argument("--quick", action="store_true", help="smoke test: four configurations, one seed, four steps")
    parser.add_argument("--sweep", action="store_true", help="compare learning rates, on all tokens")
    parser.add_argument("--time", action="store_true", help="measure step times")
    parser.add_argument("--report", action="store_true", help="write docs/when-to-use.md's table and docs/quality.svg")
    parser.add_argument("--lr", type=float, help=f"another learning rate (default {LEARNING_RATES})")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Run]:
    """The configurations that the command line names."""
    runs = [run for run in study_runs() if any(fnmatch.fnmatch(run.name, pattern) for pattern in options.only)]
    if options.worker:
        return [run for run in runs if run.name in options.worker]
    return [run for run in runs if run.name in QUICK_RUNS] if options.quick else runs


def main() -> int:
    """Run the command, or the work of a subprocess."""
    options = arguments()
    study = QUICK if options.quick else Study()
    options.out = options.out or (WORK / "quick" if options.quick else ROOT / "benchmarks" / "results" / "quality")
    runs = chosen(options)
    if options.worker:
        return measure_times(study, runs, options.out) if options.time else work(runs[0], study, options)
    if options.list:
        print(*(run.name for run in runs), sep="\n")
        return 0
    if options.report:
        import plot

        return plot.report(options.out, ROOT / "docs")
    prepare(study)
    if options.sweep:
        return sweep(study, options.out)
    return times(runs, options) if options.time else curves(study, runs, options)


if __name__ == "__main__":
    sys.exit(main())
