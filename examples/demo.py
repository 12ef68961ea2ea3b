"""Fine-tune a model in three ways from the same weights, and compare their cost: `make demo`.

The ways: all tokens through torch.compile, gradient checkpointing, and `backend="tokenseek"`. Without arguments the
model is a byte-level Llama, which is briefly trained on the sources of Python's standard library, then fine-tuned on
docstring -> code pairs from it. With your own weights and data:

    python examples/demo.py --model PATH_OR_ID --data FILE.jsonl --keep-ratio 0.1
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(os.cpu_count()))

import data
import measure
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from training import checkpoint, held_out_loss, step

Event = dict[str, Any]
WAYS = {
    "compile": "torch.compile",
    "checkpoint": "gradient checkpointing",
    "tokenseek": "tokenseek, {ratio:.0%} of tokens",
}
console = Console(width=None if sys.stdout.isatty() else 140)


def byte_llama(length: int) -> nn.Module:
    """A Llama with about 2.5 million parameters and three query heads per key/value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": length}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=data.BYTE_VOCAB, use_cache=False, **sizes, **heads))


def load(path: str) -> nn.Module:
    """A causal language model in float32, in training mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config.use_cache = False
    return model.train()


def prepare(way: str, model: nn.Module, options: argparse.Namespace) -> None:
    """Prepare the model in place for a way to train."""
    if way == "compile":
        model.compile()
    elif way == "checkpoint":
        checkpoint(model)
    else:
        model.compile(backend="tokenseek", options={"keep_ratio": options.keep_ratio, "logits": "drop"})


def tell(**event: Any) -> None:
    """Print one line of JSON for the process that shows the progress."""
    print(json.dumps(event), flush=True)


def pretrain(work: Path, options: argparse.Namespace) -> None:
    """Train a byte-level model on Python sources, and save it for the three ways."""
    torch.manual_seed(0)
    text = torch.load(work / "text.pt")
    model = byte_llama(options.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=options.pretrain)
    for number in range(options.pretrain):
        batch = data.draw(text, max(1, options.batch // 2), number)  # more and smaller steps, from random weights
        tell(step=number + 1, loss=step(model, batch, optimizer))
        schedule.step()
    model.save_pretrained(work / "model")


def fine_tune(way: str, work: Path, options: argparse.Namespace) -> None:
    """Train in one way from the saved weights: first step (compiles), measured steps, saved bytes, held-out loss."""
    torch.manual_seed(0)
    pairs, held_out = torch.load(work / "pairs.pt"), torch.load(work / "held_out.pt")
    model = load(options.model or str(work / "model"))
    before = held_out_loss(model, held_out, options.batch)
    prepare(way, model, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    first = first_step(model, data.draw(pairs, options.batch, 0), optimizer)
    seconds = []
    with measure.PeakMemory() as peak:
        for number in range(1, options.steps):
            batch, start = data.draw(pairs, options.batch, number), time.perf_counter()
            loss = step(model, batch, optimizer)
            seconds.append(time.perf_counter() - start)
            tell(step=number + 1, loss=loss)
    saved = measure.saved_bytes(model, data.draw(pairs, options.batch, 0), model.config.get_text_config().vocab_size)
    median, after = statistics.median(seconds), held_out_loss(model, held_out, options.batch)
    tell(result={"first": first, "step": median, "peak": peak.bytes, **saved, "before": before, "after": after})


def first_step(model: nn.Module, batch: data.Batch, optimizer: torch.optim.Optimizer) -> float:
    """Run the first step, which compiles, and return its seconds."""
    tell(stage="first step (compiles)")
    start = time.perf_counter()
    loss = step(model, batch, optimizer)
    tell(step=1, loss=loss)
    return time.perf_counter() - start


def events(job: str, work: Path) -> Iterator[Event]:
    """The events of a worker process as they arrive; each way compiles with an empty cache."""
    command = [sys.executable, __file__, "--worker", job, "--work", str(work), *sys.argv[1:]]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(work / "cache" / job)}
    with (work / f"{job}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        yield from (json.loads(line) for line in process.stdout or () if line.startswith("{"))
    if process.wait():
        console.print((work / f"{job}.log").read_text()[-3000:], style="dim", markup=False)
        yield {"failed": f"exit status {process.returncode}"}


def watch(title: str, job: str, steps: int, work: Path) -> Event:
    """Run a job with a progress bar, and return its result."""
    columns = [SpinnerColumn(), TextColumn("{task.description:<26}"), BarColumn(), TimeElapsedColumn()]
    result: Event = {}
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task(title, total=steps, note="starting")
        for event in events(job, work):
            progress.update(task, completed=event.get("step"), note=note(event, steps))
            result = event.get("result", result) if "failed" not in event else event
    warned = [line for line in (work / f"{job}.log").read_text().splitlines() if "Warning" in line]
    console.print(*warned, sep="\n", end="\n" if warned else "", style="dim", markup=False)
    return result


def note(event: Event, steps: int) -> str:
    """The text beside the progress bar."""
    if "step" in event:
        return f"step {event['step']}/{steps}, loss {event['loss']:.3f}"
    return (
        event.get("stage")
        or event.get("failed")
        or "done, first step {first:.1f} s, then {step:.2f} s".format(**event["result"])
    )


def build_data(work: Path, options: argparse.Namespace) -> str:
    """Write the text for pretraining, training pairs and held-out pairs to disk; return a line that describes them."""
    tokens = data.hub_tokens(options.model) if options.model else data.byte_tokens()
    library, rest = data.library_files()
    if not options.model:
        torch.save(data.windows(library, tokens, options.length), work / "text.pt")
    if options.data:
        everything, source = data.file_pairs(Path(options.data), tokens, options.length), options.data
        held_out, pairs = everything[: options.held_out], everything[options.held_out :]
    else:
        pairs, held_out = (data.library_pairs(part, tokens, options.length) for part in (library, rest))
        source = "docstring -> code of the standard library (whole files held out)"
    for name, rows in {"pairs": pairs, "held_out": held_out[: options.held_out]}.items():
        torch.save(data.encode(rows, tokens, options.length), work / f"{name}.pt")
    return f"{source}, {len(pairs)} to train on, {min(len(held_out), options.held_out)} held out"


COLUMNS: dict[str, Callable[[Event], str]] = {
    "first step s": lambda r: f"{r['first']:.1f}",
    "step s": lambda r: f"{r['step']:.3f}",
    "peak MB": lambda r: f"{r['peak'] / 1e6:,.0f}",
    "saved acts MB": lambda r: f"{r['activations'] / 1e6:,.1f}",
    "saved logits MB": lambda r: f"{r['logits'] / 1e6:,.1f}",
    "held-out before": lambda r: f"{r['before']:.4f}",
    "after": lambda r: f"{r['after']:.4f}",
}


def table(results: dict[str, Event]) -> Table:
    """A table with one line per way, or its error."""
    out = Table("way", title="Cost and loss of each way to train", title_justify="left")
    for name in COLUMNS:
        out.add_column(name, justify="right")
    for title, result in results.items():
        cells = [result["failed"]] if "failed" in result else [show(result) for show in COLUMNS.values()]
        out.add_row(title, *cells)
    return out


def footnotes(described: str, results: dict[str, Event], options: argparse.Namespace) -> str:
    """The settings behind the table, and an explanation of its columns."""
    model = options.model or f"byte-level Llama of 2.5 M parameters after {options.pretrain} steps of pretraining"
    return f"""\
model: {model}
pairs: {described}
batch {options.batch}, length {options.length}, {options.steps} steps, AdamW lr {options.lr:g}, float32
CPU, {torch.get_num_threads()} threads, torch {torch.__version__}
step: median of forward + backward + update, without the first step (which compiles). peak: resident memory beyond
model, gradients and optimizer state. saved: bytes that one forward saves for backward; activations include keys and
values.
{verdict(results, options)}"""


def verdict(results: dict[str, Event], options: argparse.Namespace) -> str:
    """The changes of the held-out loss, and how to read them."""
    falls = [f"{r['before'] - r['after']:.3f} ({title})" for title, r in results.items() if "failed" not in r]
    return f"""\
Held-out loss fell by {", ".join(falls) or "an unknown amount: all ways failed"}, after the same number of steps.
tokenseek trains on {options.keep_ratio:.0%} of the tokens, so each step learns less. One run, one seed."""


def run(options: argparse.Namespace, work: Path) -> dict[str, Event]:
    """Prepare data and weights, train in three ways, and print the table."""
    with console.status("reading and encoding the data"):
        described = build_data(work, options)
    if not options.model:
        watch("pretraining (eager)", "pretrain", options.pretrain, work)
    titles = {way: title.format(ratio=options.keep_ratio) for way, title in WAYS.items()}
    results = {title: watch(title, way, options.steps, work) for way, title in titles.items()}
    console.print(table(results), footnotes(described, results, options), sep="\n", highlight=False)
    return results


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or hub id of a causal language model (default: a byte-level Llama)")
    parser.add_argument(
        "--data", help=".jsonl with prompt and completion, or plain text (default: the standard library)"
    )
    parser.add_argument("--keep-ratio", type=float, default=0.1, help="fraction of the tokens to keep, default 0.1")
    for name, value in {"steps": 35, "batch": 16, "length": 256, "pretrain": 140, "held-out": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--lr", type=float, default=1e-3, help="default 1e-3")
    parser.add_argument("--json", type=Path, help="write the figures of the table to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def work_on(options: argparse.Namespace) -> int:
    """Run the job of a worker process."""
    if options.worker == "pretrain":
        pretrain(options.work, options)
    else:
        fine_tune(options.worker, options.work, options)
    return 0


def main() -> int:
    """Run and show the three ways, or run the job of a worker process."""
    options = arguments()
    if options.worker:
        return work_on(options)
    with tempfile.TemporaryDirectory() as work:
        results = run(options, Path(work))
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options), "results": results}, indent=2, default=str))
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
