"""A training loop that writes a report, one HTML file: `python examples/write_report.py report.html`.

A small Llama with random weights is trained on docstring -> code pairs from Python's standard library, three times on
each pair: in one run on a fifth of the tokens, and in another on all of them.
"""

import argparse
import time
from pathlib import Path

import data
import measure
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import tokenseek_fx
from tokenseek_fx.report import Run, Step, memory_of, run_of, write_report

WORDS, VISITS = 1000, 3
SPECIAL = ["<start>", "<end>", "<pad>"]


def tokenizer_of(sources: list[str]) -> ByteLevelBPETokenizer:
    """A tokenizer trained on the text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sources, vocab_size=WORDS, special_tokens=SPECIAL, show_progress=False)
    return tokenizer


def model_of(layers: int) -> LlamaForCausalLM:
    """A Llama with the same random weights in every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))


def batches_of(sources: list[str], tokens: data.Tokens, steps: int, batch: int, length: int) -> list[data.Batch]:
    """The batches of all steps; each pair comes once per visit."""
    each = -(-steps // VISITS)
    pairs = data.encode(data.library_pairs(sources, tokens, length)[: each * batch], tokens, length)
    rows = [torch.arange(number % each * batch, (number % each + 1) * batch) for number in range(steps)]
    return [{name: value[at] for name, value in pairs.items()} for at in rows]


def train(model: LlamaForCausalLM, batches: list[data.Batch]) -> tuple[list[Step], torch.optim.Optimizer]:
    """Train; return loss, time and peak of each step (only the loss of the first, which compiles) and the optimizer."""
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for number, batch in enumerate(batches, 1):
        with measure.PeakMemory() as peak:
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
        measured = {"seconds": seconds, "peak": peak.bytes} if number > 1 else {}
        steps.append(Step(number, loss.item(), **measured))
    return steps, optimizer


def make_run(steps: int, layers: int = 4, length: int = 128, batch: int = 8, **options: object) -> Run:
    """Train on selected tokens and on all tokens, and build the run. `options`: those of the backend."""
    sources = data.library_files()[0][:120]
    tokenizer = tokenizer_of(sources)
    tokens = data.Tokens(lambda text: tokenizer.encode(text).ids, start=(0,), end=1, pad=2)
    batches = batches_of(sources, tokens, steps, batch, length)

    model = model_of(layers)
    explanation = tokenseek_fx.explain(model, **batches[0], options=options)
    model.compile(backend="tokenseek", options=options)
    with tokenseek_fx.record() as rec:
        ours, optimizer = train(model, batches)

    plain = model_of(layers)
    plain.compile(backend=options.get("inner", "inductor"))
    every, _ = train(plain, batches)

    run = run_of(
        rec,
        ours,
        plain=every,
        batches=[each["input_ids"] for each in batches],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        title="Pairs of the standard library",
    )
    run.settings = {"model": f"Llama, {layers} layers", "batch": f"{batch} x {length}"}
    run.settings |= {name: str(value) for name, value in options.items()}
    run.memory = memory_of(explanation, model, optimizer)
    run.graphs = [str(explanation), *explanation.graphs]
    return run


def main() -> None:
    """Train, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=Path("report.html"))
    parser.add_argument("--steps", type=int, default=120, help="default 120")
    arguments = parser.parse_args()
    run = make_run(arguments.steps, scorer="tokenseek", keep_ratio=0.2, labelled_first=0.8)
    print(write_report(run, arguments.path))


if __name__ == "__main__":
    main()
