"""Explain and estimate: how a model would be rewritten and whether it fits, without weights or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import fx, nn
from torch._guards import TracingContext, tracing

from ..config import Config
from ..estimation import bytes_of, examples_of, on_device, traceable
from ..estimation import estimate as estimate_model
from ..explanation import Explanation, explain_graph, first_graph
from .answer import Answer, Failure, progress_console
from .models import Adapter, batch_for, without_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def explain(model: str, batch: int, length: int, adapter: Adapter | None, options: dict[str, Any]) -> Answer:
    """The report of ``tokenseek_fx.explain``.

    Raises:
        Failure: the model would be compiled without token selection; the message has the reason.
    """
    made = without_weights(model, adapter)
    found = explain_without_weights(made, batch_for(made, batch, length), options)
    if found.refusal:
        raise Failure(str(found), refusal=found.refusal)
    return Answer(_explained(found), [str(found)])


def explain_without_weights(model: nn.Module, batch: dict[str, Any], options: dict[str, Any]) -> Explanation:
    """``tokenseek_fx.explain`` of a model on any device, including meta; prints nothing."""
    found: list[Explanation] = []

    def look(gm: fx.GraphModule, values: Sequence[Any]) -> None:
        mode, examples = examples_of(values)
        with tracing(TracingContext(mode)):
            found.append(explain_graph(gm, examples, Config.from_options(options)))

    made, mode = traceable(model, None)
    first_graph(made, (), on_device(batch, mode), look)
    return found[0] if found else Explanation("Dynamo found no graph to compile in the model.")


def _explained(found: Explanation) -> dict[str, Any]:
    return {
        "batch": found.batch,
        "tokens": found.tokens,
        "kept": found.kept,
        "attentions": list(found.attentions),
        "losses": list(found.losses),
        "ditched": found.ditched,
        "live": found.live,
        "barriers": [str(each) for each in found.barriers],
        "forwards": found.forwards,
        "saved_bytes": {"all tokens": found.plain.by_kind(), "tokenseek": found.rewritten.by_kind()},
        "floor_bytes": found.floor,
    }


def estimate(
    model: str,
    batch: int,
    lengths: Sequence[int],
    ratios: Sequence[float],
    gpus: Sequence[str],
    adapter: Adapter | None,
    dtype: str,
    optimizer: str,
    options: dict[str, Any],
) -> Answer:
    """The peak memory of a step on a GPU for each length and ratio, and for plain ``torch.compile``; which GPUs fit it.

    Raises:
        ConfigError: an amount of ``gpus`` is not like 24GB or 24GiB.
        Failure: the model can't be loaded.
    """
    sizes = {gpu: bytes_of(gpu) for gpu in gpus}
    made = without_weights(model, adapter)
    rows = list(_estimates(made, batch, lengths, ratios, DTYPES[dtype], optimizer, options))
    for row in rows:
        row["fits"] = {gpu: row["peak_bytes"] <= size for gpu, size in sizes.items()}
    settings = {"model": model, "batch": batch, "dtype": dtype, "optimizer": optimizer, "lora": adapter is not None}
    return Answer({**settings, "rows": rows}, [_table(rows, gpus), _footnote(settings, options)])


def _estimates(
    model: Any,
    batch: int,
    lengths: Iterable[int],
    ratios: Sequence[float],
    dtype: torch.dtype,
    optimizer: str,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        task = progress.add_task("")
        for length in lengths:
            for i, ratio in enumerate(ratios):
                progress.update(task, description=f"{length} tokens, {ratio:.0%} kept")
                chosen = {**options, "keep_ratio": ratio}
                found = estimate_model(
                    model, batch, length, options=chosen, optimizer=optimizer, dtype=dtype, device="cuda", plain=i == 0
                )
                if found.plain:
                    yield _row(length, None, found.phases(found.plain))
                yield _row(length, ratio, found.phases())


def _row(length: int, ratio: float | None, phases: dict[str, int]) -> dict[str, Any]:
    return {"length": length, "keep_ratio": ratio, "phases_bytes": phases, "peak_bytes": max(phases.values())}


def _table(rows: Sequence[dict[str, Any]], gpus: Sequence[str]) -> Table:
    out = Table("tokens", "kept", "peak GB", title="Will it fit?", title_justify="left")
    for gpu in gpus:
        out.add_column(gpu, justify="center")
    for row in rows:
        kept = "all (torch.compile)" if row["keep_ratio"] is None else f"{row['keep_ratio']:.0%}"
        fits = ["[green]yes[/]" if row["fits"][gpu] else "[red]no[/]" for gpu in gpus]
        out.add_row(str(row["length"]), kept, f"{row['peak_bytes'] / 1e9:.2f}", *fits)
    return out


def _footnote(settings: dict[str, Any], options: dict[str, Any]) -> str:
    how = "LoRA" if settings["lora"] else "full training"
    others = "".join(f", {name}={value}" for name, value in options.items())
    return (
        f"{settings['model']}: {how}, batch {settings['batch']}, {settings['dtype']}, {settings['optimizer']}{others}. "
        "An estimate: it leaves out kernels' workspaces, the CUDA context and the allocator's fragmentation."
    )
