"""Comparing a compiled model with the eager reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from captured import Captured, captured
from torch import nn

import tokenseek_fx
from tokenseek_fx import Config, reference
from tokenseek_fx.passes.memory.saved import SavedTensors

#: How the comparisons select rows by default.
TOPK = {"scorer": "random", "select": "topk"}
#: Options for compiling the rewritten graph: with one of them, a model is compiled.
COMPILING = {"inner", "mode", "inductor_options", "chunk_bytes", "recompute", "kv", "memory_budget"}
#: Options that the partitioner reads.
_SAVING = {"recompute", "kv"}
Grads = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One forward and backward: the model's output, its gradients by parameter, the kept rows and their selection."""

    output: Any
    grads: Grads
    indices: torch.Tensor
    selection: tokenseek_fx.Selection | None = None

    @property
    def loss(self) -> torch.Tensor:
        return loss_of(self.output)


def loss_of(output: Any) -> torch.Tensor:
    return output.loss if hasattr(output, "loss") else output[0] if isinstance(output, tuple) else output


def grads_of(model: nn.Module) -> Grads:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compiled(model: nn.Module, batch: dict[str, Any], **options: Any) -> Run:
    """Train one step with ``backend="tokenseek"`` on a copy of ``model``, strictly.

    The rewritten graph runs without a compiler; if an option decides what is saved, it is partitioned as well.
    """
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    inner = "aot_eager" if _SAVING & {*options} else "eager"
    options = {"inner": inner, "keep_ratio": 0.3, **TOPK, "strict": True, **options}
    run = torch.compile(model, backend="tokenseek", options=options)
    with tokenseek_fx.record() as rec:
        output = run(**batch)
    loss_of(output).backward()
    (selection,) = rec
    return Run(output, grads_of(model), selection.indices, selection)


def executed(model: nn.Module, batch: dict[str, Any], **options: Any) -> Run:
    """The same step, computed by the two streams without tracing or compiling.

    The graph is captured once for each model and form of the batch, whatever the options. ``test_traced.py`` compares
    this with the traced graph.
    """
    return _run(Captured.execute, model, batch, options)


def traced(model: nn.Module, batch: dict[str, Any], **options: Any) -> Run:
    """The same step, computed by the graph traced from the two streams, in segments that are not compiled."""
    return _run(Captured.trace, model, batch, options)


def saved(model: nn.Module, batch: dict[str, Any], **options: Any) -> SavedTensors:
    """What the rewritten graph saves for backward, as ``explain`` reports it."""
    return captured(model, batch).saved(Config.from_options({"inner": "aot_eager", **options}))


def _run(step: Callable[..., Any], model: nn.Module, batch: dict[str, Any], options: dict[str, Any]) -> Run:
    if refused := COMPILING & {*options}:
        raise ValueError(f"Nothing is compiled here, so these have no effect: {', '.join(sorted(refused))}.")
    found = captured(model, batch)
    config = Config.from_options({"inner": "eager", "keep_ratio": 0.3, **TOPK, "strict": True, **options})
    output, selection = step(found, batch, config)
    loss_of(output).backward()
    return Run(output, grads_of(found.model), selection.indices, selection)


def by_reference(
    model: nn.Module,
    batch: dict[str, Any],
    indices: torch.Tensor,
    length: int | None = None,
    weights: torch.Tensor | None = None,
    open_blocks: str | Callable[[nn.Module], Iterable[nn.Module]] | None = None,
    others: tuple[tokenseek_fx.Selection, ...] = (),
) -> Run:
    """The same step by the eager definition.

    ``open_blocks``: the path of the blocks for ``kv_grad="all"``, or a function that finds them.
    """
    model = copy.deepcopy(model)
    found = model.get_submodule(open_blocks) if isinstance(open_blocks, str) else open_blocks and open_blocks(model)
    blocks = cast(Iterable[nn.Module], found or ())
    further = {selection.scores.shape[1]: selection.indices for selection in others}
    with reference.ditching(model, indices, length, weights, blocks, further):
        output = model(**batch)
        loss_of(output).backward()
    return Run(output, grads_of(model), indices)


def error(a: Grads, b: Grads) -> float:
    """The largest difference between two sets of gradients, relative to the largest (absolute if all should be 0)."""
    assert set(a) == set(b), set(a) ^ set(b)
    assert all(torch.isfinite(g).all() for g in b.values())
    largest = max(g.abs().max().item() for g in b.values())
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a) / (largest or 1.0)


def assert_matches(
    model: nn.Module,
    batch: dict[str, Any],
    tol: float,
    length: int | None = None,
    open_blocks: str | None = None,
    **options: Any,
) -> Run:
    """Loss and every gradient equal the reference for the rows (and weights) that were kept.

    The loss is that of the kept tokens; with ``report_loss="full"`` it is that of all tokens. With an option of
    ``COMPILING`` the model is compiled, otherwise the two streams are executed.
    """
    options = {"report_loss": "kept", **options}
    run = (compiled if COMPILING & {*options} else executed)(model, batch, **options)
    chosen = run.selection
    expected = by_reference(model, batch, run.indices, length, chosen.weights, open_blocks, chosen.others)
    loss = expected.loss if options["report_loss"] == "kept" else loss_of(copy.deepcopy(model)(**batch))
    torch.testing.assert_close(run.loss.detach(), loss.detach(), rtol=max(tol, 1e-6), atol=0)
    assert error(run.grads, expected.grads) <= tol
    return run
