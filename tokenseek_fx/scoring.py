"""A scoring forward of the package's own: the rows that the backend would keep, for use with ``selecting``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import compat, recording
from .compilation import inner_compiler, refuse_split, trains
from .compiled import KeepAll, fingerprints, noise_for, selections_of
from .config import Config
from .passes.graph.errors import GraphNotSupported, NothingToSelect, TokenSeekError
from .passes.graph.program import Program
from .passes.pipeline import ANALYSED, training
from .passes.streams.trace import Rewrite, TraceStreams
from .recording import Selection


def seek(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **inputs: Any) -> Selection:
    """Score the tokens of ``model(*args, **inputs)`` and choose rows as the backend with these ``options`` would.

    The model runs once without gradient, as far as the scores need it; it may be compiled or not, and is left as it is.

    Raises:
        GraphNotSupported: the model is not one graph, or the graph can't be scored.

    >>> rows = seek(model, **batch)  # doctest: +SKIP
    >>> with selecting(rows.indices, rows.weights):  # doctest: +SKIP
    ...     model(**batch).loss.backward()
    """
    run = torch.compile(_forward, backend=_Scoring(Config.from_options(options)))
    try:
        with torch.enable_grad(), compat.unlimited_recompiles():
            run(getattr(model, "_orig_mod", model), args, inputs)
    except _Found as found:
        return found.selection
    raise GraphNotSupported("Dynamo found no graph to compile in the model.")


def _forward(model: torch.nn.Module, args: tuple, inputs: dict[str, Any]) -> Any:
    return model._call_impl(*args, **inputs)


class _Found(Exception):
    """The rows are known, the rest of the model need not run."""

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection


@dataclass(frozen=True)
class _Scoring:
    """The backend that only chooses. Two with equal options are one to Dynamo, so that nothing is compiled twice."""

    config: Config

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            choose = _choosing(gm, inputs, self.config)
        except TokenSeekError as error:
            return _raising(error)

        def stop(*args: Any) -> Any:
            raise _Found(recording.selection(*choose(args)))

        return stop


def _raising(error: TokenSeekError) -> Callable[..., Any]:
    """Raised when the graph is called: Dynamo would wrap it."""

    def stop(*args: Any) -> Any:
        raise error

    return stop


def _choosing(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config
) -> Callable[[Sequence[Any]], list[dict[str, Any]]]:
    if not trains(inputs):
        raise NothingToSelect("Nothing requires grad.")
    refuse_split(gm)
    plan = config.plan()
    program = training(plan).run(Program(gm, tuple(inputs)), until=ANALYSED)
    if plan.keeps_all(program):
        return KeepAll(gm, program).selection
    program = (training(plan).until("two streams") + TraceStreams(choice_only=True)).run(program)
    instances, noise = fingerprints(program), noise_for(program, config.seed)
    with torch.no_grad():
        compiled = inner_compiler(config)(program[Rewrite].module, program[Rewrite].inputs)

    def choose(args: Sequence[Any]) -> list[dict[str, Any]]:
        with torch.no_grad():
            found = compiled(*args, *noise(args))
        first, *others = selections_of(program, found)
        return [{**first, **instances(args)}, *others]

    return choose
