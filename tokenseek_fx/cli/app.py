"""The commands and their options. A command imports the module that does its work when it runs."""

from __future__ import annotations

import json
import logging
import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import Config
from .answer import Answer, Usage, answers
from .doctor import doctor as look

app = typer.Typer(
    name="tokenseek",
    help="Fine-tune transformers on the tokens that matter. "
    "Exit codes: 0 success, 1 failure, 2 invalid request, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Weights(StrEnum):
    """Dtypes of the weights in training; ``mixed``: float32 under autocast to bfloat16."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    mixed = "mixed"


class Held(StrEnum):
    """Dtypes of the weights that `estimate` takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Optimizer(StrEnum):
    """Optimizers that `estimate` takes."""

    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"


_SELECTION, _LORA, _DATA, _TRAINING = "Which tokens", "LoRA", "Data", "Training"
Model = Annotated[str, typer.Argument(help="Directory of a model, or its id on the hub.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and all else to stderr.")]
Ratio = Annotated[
    float,
    typer.Option("--keep-ratio", "-r", help="Fraction of the tokens to keep, 0 < r <= 1.", rich_help_panel=_SELECTION),
]
Scorer = Annotated[
    str | None, typer.Option(help="How tokens are scored: loss, tokenseek, random, ...", rich_help_panel=_SELECTION)
]
Rounds = Annotated[
    int | None,
    typer.Option(min=1, help="Run the kept tokens in so many rounds in backward.", rich_help_panel=_SELECTION),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Any other option of the backend, e.g. -o recompute=rows. May be repeated.",
        rich_help_panel=_SELECTION,
    ),
]
Lora = Annotated[bool, typer.Option("--lora", help="Train LoRA adapters only.", rich_help_panel=_LORA)]
Qlora = Annotated[bool, typer.Option("--qlora", help="LoRA on a 4-bit base (bitsandbytes).", rich_help_panel=_LORA)]
Rank = Annotated[int, typer.Option("--lora-rank", min=1, help="Rank of the adapters.", rich_help_panel=_LORA)]
Alpha = Annotated[
    int | None,
    typer.Option("--lora-alpha", min=1, help="Scale of the adapters; default: twice the rank.", rich_help_panel=_LORA),
]
Dropout = Annotated[
    float, typer.Option("--lora-dropout", min=0, max=1, help="Dropout of the adapters.", rich_help_panel=_LORA)
]
Targets = Annotated[
    str,
    typer.Option(
        "--lora-targets", help="Names of linear layers, separated by commas, or all-linear.", rich_help_panel=_LORA
    ),
]
Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences in a batch.")]
Length = Annotated[int, typer.Option("--length", "-l", min=2, help="Tokens in a sequence.")]


def chosen(ratio: float | None, scorer: str | None, rounds: int | None, others: list[str] | None) -> dict[str, Any]:
    """The options of the backend by name, checked.

    Raises:
        Usage: an entry of ``others`` is not NAME=VALUE.
        ConfigError: an option is unknown or its value invalid.
    """
    found: dict[str, Any] = {}
    for each in others or ():
        name, equals, value = each.partition("=")
        if not equals:
            raise Usage(f"--option {each}: expected NAME=VALUE.")
        found[name.strip()] = _value(value)
    named = {"scorer": scorer, "rounds": rounds}
    found |= {name: value for name, value in named.items() if value is not None}
    if "keep_tokens" not in found and ratio is not None:
        found = {"keep_ratio": ratio} | found
    Config.from_options(found)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def quiet() -> None:
    """Silence notes and progress bars of the libraries, which would mix with ours; their errors still show."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*|peft\..*")


def needs_transformers() -> None:
    """Check that transformers is installed, and silence libraries.

    Raises:
        Failure: it isn't.
    """
    from .models import library

    library("transformers")
    quiet()


@app.command()
@answers
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Skip the training step of a tiny model.")] = False,
    as_json: AsJson = False,
) -> Answer:
    """Show versions, compiler and GPU, and what works on this machine."""
    return look(quick)


@app.command()
@answers
def explain(
    model: Model,
    batch: Batch = 2,
    length: Length = 512,
    keep_ratio: Ratio = 0.1,
    scorer: Scorer = None,
    rounds: Rounds = None,
    option: Options = None,
    lora: Lora = False,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    as_json: AsJson = False,
) -> Answer:
    """Show how a model would be rewritten: token axis, cost, barriers, saved bytes. Needs its configuration only."""
    from . import models, predict

    options = chosen(keep_ratio, scorer, rounds, option)
    needs_transformers()
    adapter = models.adapter_of(lora, False, rank, None, 0.0, targets)
    return predict.explain(model, batch, length, adapter, options)


@app.command()
@answers
def estimate(
    model: Model,
    batch: Batch = 1,
    length: Annotated[
        list[int], typer.Option("--length", "-l", min=2, help="Tokens in a sequence; may be repeated.")
    ] = [  # noqa: B006
        2048
    ],
    keep_ratio: Annotated[
        list[float],
        typer.Option(
            "--keep-ratio", "-r", help="Fraction of the tokens to keep; may be repeated.", rich_help_panel=_SELECTION
        ),
    ] = [0.1],  # noqa: B006
    gpu: Annotated[list[str], typer.Option("--gpu", help="Memory (24GB, 24GiB); may be repeated.")] = [  # noqa: B006
        "24GB",
        "48GB",
        "80GB",
        "141GB",
    ],
    dtype: Annotated[Held, typer.Option(help="Dtype of the weights.")] = Held.bfloat16,
    optimizer: Annotated[
        Optimizer, typer.Option(help="Optimizer; its states have the dtype of the weights.")
    ] = Optimizer.adamw,
    scorer: Scorer = None,
    rounds: Rounds = None,
    option: Options = None,
    lora: Lora = False,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    as_json: AsJson = False,
) -> Answer:
    """Will it fit? Estimate a step's memory for lengths, ratios and GPUs. Needs the model's configuration only."""
    from . import models, predict

    options = chosen(None, scorer, rounds, option)
    for ratio in keep_ratio:
        chosen(ratio, scorer, rounds, option)
    needs_transformers()
    adapter = models.adapter_of(lora, False, rank, None, 0.0, targets)
    return predict.estimate(model, batch, length, keep_ratio, gpu, adapter, dtype.value, optimizer.value, options)


@app.command()
@answers
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run of `tokenseek finetune`.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: RUN/report.html.")] = None,
    as_json: AsJson = False,
) -> Answer:
    """Write the HTML report of a run again: one file that needs no network."""
    from ..report import Run, write_report
    from .answer import Failure

    try:
        path = write_report(Run.load(run), out or run / "report.html")
    except FileNotFoundError:
        raise Failure(f"{run} holds no run: run.json is missing.") from None
    except ValueError as error:
        raise Failure(str(error)) from None
    return Answer({"report": str(path)}, [f"report: {path}"])


@app.command()
@answers
def finetune(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            help="A .jsonl, .json, .csv, .tsv, .parquet or text file, a directory, or the name of a dataset.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory for checkpoints, model and report.")] = Path(
        "tokenseek-run"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out from its last checkpoint.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Then train on all tokens too, and show both runs in the report.")
    ] = False,
    keep_ratio: Ratio = 0.1,
    scorer: Scorer = None,
    rounds: Rounds = None,
    option: Options = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="One column (text or messages) or two (prompt,completion); default: the known names in the data.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.", rich_help_panel=_DATA)] = "train",
    subset: Annotated[str | None, typer.Option(help="Subset of the dataset.", rich_help_panel=_DATA)] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Skip rows that can't be used, and count them.", rich_help_panel=_DATA),
    ] = False,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=0, help="Sequences held out to measure the loss; default: a tenth, at most 64.", rich_help_panel=_DATA
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", "-l", min=2, help="Longest sequence, in tokens.", rich_help_panel=_DATA)
    ] = 1024,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory or id of the tokenizer; default: the model's.", rich_help_panel=_DATA)
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="File with a chat template, if the tokenizer has none.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data.", rich_help_panel=_TRAINING)] = 1.0,
    steps: Annotated[
        int, typer.Option(min=0, help="Stop after this many steps; 0: after --epochs.", rich_help_panel=_TRAINING)
    ] = 0,
    batch: Annotated[
        int, typer.Option("--batch", "-b", min=1, help="Sequences in a batch.", rich_help_panel=_TRAINING)
    ] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per update.", rich_help_panel=_TRAINING)] = 1,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Learning rate; default: 2e-5, for adapters 2e-4.", rich_help_panel=_TRAINING),
    ] = None,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of the steps for warm-up.", rich_help_panel=_TRAINING)
    ] = 0.03,
    dtype: Annotated[
        Weights,
        typer.Option(
            help="Dtype of the weights; mixed: float32 under autocast to bfloat16. auto: float32 on the CPU; on a GPU "
            "mixed, or bfloat16 for the base of LoRA.",
            rich_help_panel=_TRAINING,
        ),
    ] = Weights.auto,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_TRAINING)] = 500,
    seed: Annotated[
        int, typer.Option(help="Seed of the data order and of all random draws.", rich_help_panel=_TRAINING)
    ] = 0,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Start from random weights: MODEL is a configuration.", rich_help_panel=_TRAINING
        ),
    ] = False,
    lora: Lora = False,
    qlora: Qlora = False,
    rank: Rank = 16,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    targets: Targets = "all-linear",
    as_json: AsJson = False,
) -> Answer:
    """Fine-tune a model on your data; writes the model and an HTML report, and prints a table.

    Ctrl-C saves a checkpoint and prints the command that resumes. Uses one GPU: the first in CUDA_VISIBLE_DEVICES.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    options = chosen(keep_ratio, scorer, rounds, option)
    needs_transformers()
    from . import finetune as work
    from . import models

    adapter = models.adapter_of(lora, qlora, rank, alpha, dropout, targets)
    if random_weights and adapter:
        raise Usage(
            "--random-weights with LoRA: adapters are useless without their base weights. Leave out one of them."
        )
    settings = work.Settings(
        model=model,
        data=data,
        split=split,
        subset=subset,
        columns=columns,
        tokenizer=tokenizer,
        chat_template=str(chat_template) if chat_template else None,
        length=length,
        held_out=held_out,
        epochs=epochs,
        steps=steps or -1,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        warmup=warmup,
        dtype=dtype.value,
        seed=seed,
        random_weights=random_weights,
        skip_bad=skip_bad,
        adapter=adapter,
        options=options,
    )
    return work.finetune(settings, out, save_every, resume, compare)


class Way(StrEnum):
    """Ways to train that `bench` measures."""

    compile = "compile"
    checkpoint = "checkpoint"
    tokenseek = "tokenseek"


@app.command()
@answers
def bench(
    model: Model,
    batch: Batch = 4,
    length: Length = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Steps after the first, which compiles.")] = 5,
    way: Annotated[list[Way], typer.Option(help="May be repeated; default: all.")] = list(Way),  # noqa: B006
    dtype: Annotated[Weights, typer.Option(help="Dtype of the weights, as in `finetune`.")] = Weights.auto,
    keep_ratio: Ratio = 0.1,
    scorer: Scorer = None,
    rounds: Rounds = None,
    option: Options = None,
    lora: Lora = False,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    as_json: AsJson = False,
) -> Answer:
    """Measure time and peak memory of a training step: tokenseek, all tokens, and gradient checkpointing.

    Needs the model's configuration only: its weights are random.
    """
    options = chosen(keep_ratio, scorer, rounds, option)
    needs_transformers()
    from . import bench as work
    from . import models

    adapter = models.adapter_of(lora, False, rank, None, 0.0, targets)
    models.config_of(model)
    settings = {"model": model, "batch": batch, "length": length, "steps": steps, "dtype": dtype.value}
    return work.bench([work.Task(way=each.value, **settings, adapter=adapter, options=options) for each in way])
