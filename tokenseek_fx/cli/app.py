"""The commands and their options. What they do is in the modules beside this one, imported when they run."""

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
    help="Fine-tune transformers on the tokens that matter. Exit codes: 0 it worked, 1 it failed, 2 it was asked wrongly, "
    "130 it was interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Weights(StrEnum):
    """How weights are held."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    mixed = "mixed"


class Held(StrEnum):
    """Of an estimate."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Optimizer(StrEnum):
    """Of an estimate."""

    adamw = "adamw"
    adam = "adam"
    sgd = "sgd"


_SELECTION, _LORA, _DATA, _TRAINING = "Which tokens", "LoRA", "Data", "Training"
Model = Annotated[str, typer.Argument(help="Directory of a model, or its id on the hub.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
Ratio = Annotated[
    float,
    typer.Option(
        "--keep-ratio", "-r", help="Share of the tokens that are kept, 0 < r <= 1.", rich_help_panel=_SELECTION
    ),
]
Scorer = Annotated[
    str | None, typer.Option(help="What tokens are chosen by: loss, tokenseek, random, ...", rich_help_panel=_SELECTION)
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
Lora = Annotated[bool, typer.Option("--lora", help="Train adapters (LoRA), not all weights.", rich_help_panel=_LORA)]
Qlora = Annotated[bool, typer.Option("--qlora", help="LoRA on a base in 4 bits (bitsandbytes).", rich_help_panel=_LORA)]
Rank = Annotated[int, typer.Option("--lora-rank", min=1, help="Rank of the adapters.", rich_help_panel=_LORA)]
Alpha = Annotated[
    int | None,
    typer.Option("--lora-alpha", min=1, help="Their scale; twice the rank if not given.", rich_help_panel=_LORA),
]
Dropout = Annotated[float, typer.Option("--lora-dropout", min=0, max=1, help="Their dropout.", rich_help_panel=_LORA)]
Targets = Annotated[
    str, typer.Option("--lora-targets", help="Names of linear layers, by commas, or all-linear.", rich_help_panel=_LORA)
]
Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences in a batch.")]
Length = Annotated[int, typer.Option("--length", "-l", min=2, help="Tokens of a sequence.")]


def chosen(ratio: float | None, scorer: str | None, others: list[str] | None) -> dict[str, Any]:
    """Options of the backend, checked.

    Raises:
        Usage: no NAME=VALUE.
        ConfigError: an unknown or bad option.
    """
    found: dict[str, Any] = {}
    for each in others or ():
        name, equals, value = each.partition("=")
        if not equals:
            raise Usage(f"--option {each}: expected NAME=VALUE.")
        found[name.strip()] = _value(value)
    found |= {} if scorer is None else {"scorer": scorer}
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
    """Libraries say what concerns the user; their bars and remarks would stand among ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("huggingface_hub", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*|peft\..*")


def needs_transformers() -> None:
    """Raise ``Failure`` where it isn't installed."""
    from .models import library

    library("transformers")
    quiet()


@app.command()
@answers
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Only look; don't compile and train a tiny model.")] = False,
    as_json: AsJson = False,
) -> Answer:
    """Versions, compiler, GPU, and what will work here."""
    return look(quick)


@app.command()
@answers
def explain(
    model: Model,
    batch: Batch = 2,
    length: Length = 512,
    keep_ratio: Ratio = 0.1,
    scorer: Scorer = None,
    option: Options = None,
    lora: Lora = False,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    as_json: AsJson = False,
) -> Answer:
    """What would be done with a model: token axis, cost, barriers, saved bytes. Needs its configuration alone."""
    from . import models, predict

    options = chosen(keep_ratio, scorer, option)
    needs_transformers()
    adapter = models.adapter_of(lora, False, rank, None, 0.0, targets)
    return predict.explain(model, batch, length, adapter, options)


@app.command()
@answers
def estimate(
    model: Model,
    batch: Batch = 1,
    length: Annotated[
        list[int], typer.Option("--length", "-l", min=2, help="Tokens of a sequence; may be repeated.")
    ] = [  # noqa: B006
        2048
    ],
    keep_ratio: Annotated[
        list[float],
        typer.Option(
            "--keep-ratio", "-r", help="Share of the tokens that are kept; may be repeated.", rich_help_panel=_SELECTION
        ),
    ] = [0.1],  # noqa: B006
    gpu: Annotated[list[str], typer.Option("--gpu", help="Memory, as 24GB or 24GiB; may be repeated.")] = [  # noqa: B006
        "24GB",
        "48GB",
        "80GB",
        "141GB",
    ],
    dtype: Annotated[Held, typer.Option(help="Of the weights.")] = Held.bfloat16,
    optimizer: Annotated[Optimizer, typer.Option(help="Its states have the weights' dtype.")] = Optimizer.adamw,
    scorer: Scorer = None,
    option: Options = None,
    lora: Lora = False,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    as_json: AsJson = False,
) -> Answer:
    """Will it fit? The memory of a step for lengths, ratios and GPUs. Needs the model's configuration alone."""
    from . import models, predict

    options = chosen(None, scorer, option)
    for ratio in keep_ratio:
        chosen(ratio, scorer, option)
    needs_transformers()
    adapter = models.adapter_of(lora, False, rank, None, 0.0, targets)
    return predict.estimate(model, batch, length, keep_ratio, gpu, adapter, dtype.value, optimizer.value, options)


@app.command()
@answers
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run of `tokenseek finetune`.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="The file to write; RUN/report.html if not given.")] = None,
    as_json: AsJson = False,
) -> Answer:
    """Write the HTML report of a run anew: one file that needs no network."""
    from ..report import Run, write_report
    from .answer import Failure

    try:
        path = write_report(Run.load(run), out or run / "report.html")
    except FileNotFoundError:
        raise Failure(f"{run} holds no run: there is no run.json in it.") from None
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
            help="A .jsonl, .json, .csv, .tsv, .parquet or text file, a directory, or the name of a data set.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Where checkpoints, model and report go.")] = Path("tokenseek-run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Then train on all tokens as well, and show both in the report.")
    ] = False,
    keep_ratio: Ratio = 0.1,
    scorer: Scorer = None,
    option: Options = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="One column (text or messages) or two (prompt,completion); known names are found.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.", rich_help_panel=_DATA)] = "train",
    subset: Annotated[str | None, typer.Option(help="Of a data set.", rich_help_panel=_DATA)] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out rows that can't be used, and count them.", rich_help_panel=_DATA),
    ] = False,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=0, help="Sequences to measure the loss on; a tenth, at most 64, if not given.", rich_help_panel=_DATA
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", "-l", min=2, help="Longest sequence, in tokens.", rich_help_panel=_DATA)
    ] = 1024,
    tokenizer: Annotated[
        str | None, typer.Option(help="Its directory or id, if not the model's.", rich_help_panel=_DATA)
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A file, where the tokenizer has none.", exists=True, dir_okay=False, rich_help_panel=_DATA),
    ] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data.", rich_help_panel=_TRAINING)] = 1.0,
    steps: Annotated[
        int, typer.Option(min=0, help="Stop after so many steps; 0: by epochs.", rich_help_panel=_TRAINING)
    ] = 0,
    batch: Annotated[
        int, typer.Option("--batch", "-b", min=1, help="Sequences in a batch.", rich_help_panel=_TRAINING)
    ] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches for each update.", rich_help_panel=_TRAINING)] = 1,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Learning rate; 2e-5, of adapters 2e-4, if not given.", rich_help_panel=_TRAINING),
    ] = None,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps in which it rises.", rich_help_panel=_TRAINING)
    ] = 0.03,
    dtype: Annotated[
        Weights,
        typer.Option(
            help="Of the weights; mixed: float32 under autocast to bfloat16. auto: float32 on the CPU; on a GPU mixed, of LoRA's "
            "base bfloat16.",
            rich_help_panel=_TRAINING,
        ),
    ] = Weights.auto,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=_TRAINING)] = 500,
    seed: Annotated[
        int, typer.Option(help="Of the order of the data and of all draws.", rich_help_panel=_TRAINING)
    ] = 0,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Begin with random weights: MODEL is a configuration.", rich_help_panel=_TRAINING
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
    """Fine-tune a model on your data; ends with a table, the model and an HTML report.

    Ctrl-C stops with a checkpoint and says how to go on. One GPU is used: the first that CUDA_VISIBLE_DEVICES names.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    options = chosen(keep_ratio, scorer, option)
    needs_transformers()
    from . import finetune as work
    from . import models

    adapter = models.adapter_of(lora, qlora, rank, alpha, dropout, targets)
    if random_weights and adapter:
        raise Usage("--random-weights with LoRA: adapters of weights that nobody has are of no use.")
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
    way: Annotated[list[Way], typer.Option(help="May be repeated; all of them if not given.")] = list(Way),  # noqa: B006
    dtype: Annotated[Weights, typer.Option(help="Of the weights, as in `finetune`.")] = Weights.auto,
    keep_ratio: Ratio = 0.1,
    scorer: Scorer = None,
    option: Options = None,
    lora: Lora = False,
    rank: Rank = 16,
    targets: Targets = "all-linear",
    as_json: AsJson = False,
) -> Answer:
    """Measure a training step of a model: time and peak memory, ours beside all tokens and checkpointing.

    Needs the model's configuration alone: its weights are random.
    """
    options = chosen(keep_ratio, scorer, option)
    needs_transformers()
    from . import bench as work
    from . import models

    adapter = models.adapter_of(lora, False, rank, None, 0.0, targets)
    models.config_of(model)
    settings = {"model": model, "batch": batch, "length": length, "steps": steps, "dtype": dtype.value}
    return work.bench([work.Task(way=each.value, **settings, adapter=adapter, options=options) for each in way])
