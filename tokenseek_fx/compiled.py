"""Compiled graphs as Dynamo calls them: they take noise or given rows, and record the selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from . import recording
from .given import Given, given
from .outputs import without_gradient
from .passes.analysis.activity import Activity
from .passes.analysis.losses import weighted_losses
from .passes.analysis.row_index import device_of, runtime_sizes
from .passes.analysis.token_axes import RowPlace, TokenAxes, place_in
from .passes.graph.errors import GraphNotSupported
from .passes.graph.nodes import is_tensor
from .passes.graph.program import Program
from .passes.keep.token_parallel import parallel_dims
from .passes.streams.trace import Rewrite

Compiled = Callable[..., Any]


class Rewritten:
    """The compiled rewritten graph, called with the inputs of Dynamo's graph."""

    def __init__(self, compiled: Compiled, program: Program, seed: int | None) -> None:
        self.compiled, self.noise, self.program = compiled, noise_for(program, seed), program
        self.instances, self.marked = fingerprints(program), without_gradient(program)

    def __call__(self, *args: Any) -> Sequence[Any]:
        outputs = self.compiled(*args, *self.noise(args))
        count = len(outputs) - sum(map(len, self.program[Rewrite].names))
        if recording.is_open():
            first, *others = selections_of(self.program, outputs[count:])
            recording.note({**first, **self.instances(args)}, *others)
        return self.marked(outputs[:count])


class WithRows:
    """The compiled graph rewritten for given rows, called with the inputs of Dynamo's graph and the rows.

    ``why``: why it is a fragment of the model, for the error of a loss that is not compiled.
    """

    def __init__(self, compiled: Compiled, program: Program, is_fragment: bool, why: str = "") -> None:
        self.compiled, self.program, self.is_fragment, self.why = compiled, program, is_fragment, why
        self.shape, self.instances = runtime_sizes(program, program[TokenAxes].main), fingerprints(program)
        self.weighs = bool(weighted_losses(program))
        self.marked = list if is_fragment else without_gradient(program)
        axes = program[TokenAxes]
        self.inputs = [place_in(axes, node) if is_tensor(node) else None for node in program.placeholders]
        self.outputs = [place_in(axes, x) if isinstance(x, fx.Node) and is_tensor(x) else None for x in program.outputs]

    def __call__(self, *args: Any) -> Sequence[Any]:
        inputs = args[: len(self.inputs)]
        batch, tokens = self.shape(inputs)
        rows = check_rows(self.program, (batch, tokens))
        self._check_passed(rows, inputs)
        rows.used, rows.weighed = True, rows.weighed or self.weighs
        if recording.is_open() and not self.is_fragment:
            scores = torch.zeros(batch, tokens, device=rows.indices.device).scatter(1, rows.indices, 1.0)
            recording.note({**rows.named, "scores": scores, **self.instances(inputs)})
        outputs = self.marked(self.compiled(*args))
        placed = [(x, place) for x, place in zip(outputs, self.outputs, strict=False) if place is not None]
        rows.places.update(placed)
        for x, place in placed if self.is_fragment else ():
            if x.requires_grad:
                x.register_hook(partial(_refuse_other_rows, rows.indices, place, self.why))
        return outputs

    def _check_passed(self, rows: Given, inputs: Sequence[Any]) -> None:
        """Raise ``GraphNotSupported`` if fragments before this one used another token axis or mixed tokens."""
        for x, place in zip(inputs, self.inputs, strict=True):
            if isinstance(x, Tensor) and rows.places.get(x, place) != place:
                raise GraphNotSupported("The token axis of a fragment differs from that of the fragments before it.")
            if isinstance(x, Tensor) and x in rows.parallel and (not place or place[1] not in rows.parallel[x]):
                raise GraphNotSupported(
                    "A fragment before the first attention of the model mixes tokens, or may do so.",
                    "Compile it together with the first attention.",
                )


def _refuse_other_rows(indices: Tensor, place: RowPlace, why: str, grad: Tensor) -> None:
    """Refuse a gradient of rows that are not given: it comes from a loss of all tokens, outside of the graphs.

    Args:
        indices: the given rows.
        place: the batch dim and the token dim of the gradient.
        why: added to the error.
        grad: the gradient.
    """
    batch, token = place
    reached = grad.detach().abs() > 0  # not where it is NaN, which a scaled gradient may be
    others = [dim for dim in range(grad.ndim) if dim not in place]
    reached = reached.any(others) if others else reached
    by_token = reached.expand(1, -1) if batch is None else reached if batch < token else reached.t()
    if by_token.scatter(1, indices, False).any():
        raise GraphNotSupported(
            "A gradient reached rows that are not given, at an output of a fragment of the model: its loss is not "
            f"compiled, and is that of all tokens. {why}".strip(),
            "Compute the loss in a function or module of its own, which Dynamo compiles, or on the given rows alone "
            "(labels of -100 elsewhere).",
        )


def check_rows(program: Program, sizes: tuple[int, int]) -> Given:
    """The given rows, after checking that they fit a batch of ``sizes`` (sequences, tokens).

    Raises:
        SelectionError: they don't fit.
    """
    rows = given()
    assert rows is not None and program[Activity] is not None
    rows.check_fits(*sizes, program[Activity].trainable[0].meta["val"].device)
    return rows


class RowWise:
    """A row-wise graph: it needs no rewrite, whatever rows are selected."""

    def __init__(self, compiled: Compiled, program: Program, parallel: bool = True) -> None:
        self.compiled, self.inputs = compiled, len(program.inputs)
        self.parallel = parallel_dims(program) if parallel else {}

    def __call__(self, *args: Any) -> Any:
        rows = given()
        assert rows is not None
        rows.used, inputs = True, args[: self.inputs]
        before = {i: rows.parallel.get(x, frozenset()) for i, x in enumerate(inputs) if is_activation(x)}
        if self.parallel and not all(before.values()):
            raise unknown_tokens("an input with gradient")
        outputs = self.compiled(*inputs)
        for position, dims in self.parallel.items():
            right = (dim for dim, at in dims.items() if all(at.get(i) in known for i, known in before.items()))
            rows.parallel[outputs[position]] = frozenset(right)
        return outputs


class KeepAll:
    """The plain graph, for selections that keep every token."""

    def __init__(self, compiled: Compiled, program: Program) -> None:
        self.compiled, self.device = compiled, device_of(program)
        self.shapes = [runtime_sizes(program, axis) for axis in program[TokenAxes].tokens]
        self.instances = fingerprints(program)

    def __call__(self, *args: Any) -> Any:
        if recording.is_open():
            recording.note(*self.selection(args))
        return self.compiled(*args)

    def selection(self, args: Sequence[Any]) -> list[dict[str, Tensor]]:
        """All tokens, as fields of ``Selection`` by name, for each token axis."""
        first, *others = (self._everything(*shape(args)) for shape in self.shapes)
        return [{**first, **self.instances(args)}, *others]

    def _everything(self, batch: int, tokens: int) -> dict[str, Tensor]:
        everything = torch.arange(tokens, device=self.device).repeat(batch, 1)
        return {"indices": everything, "scores": torch.ones_like(everything, dtype=torch.float32)}


def selections_of(program: Program, values: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The selections that a rewritten graph returned (its last outputs): fields by name, for each token axis."""
    outputs = iter(values)
    return [{name: next(outputs) for name in names} for names in program[Rewrite].names]


def fingerprints(program: Program) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
    """A function of a call's arguments that hashes each sequence's token ids.

    It returns ``{"instances": int64 [B]}``, or ``{}`` if no input holds token ids.
    """
    axes = program[TokenAxes]
    layout = (axes.main.batch, axes.main.token)
    places = [i for i, node in enumerate(program.placeholders) if is_tensor(node) and axes.of(node) == layout]
    ids = [i for i in places if not program.inputs[i].is_floating_point()]
    if not ids:
        return lambda args: {}
    return lambda args: {"instances": torch.stack([_hashed(args[i].long(), i) for i in ids]).sum(0)}


def _hashed(ids: torch.Tensor, salt: int) -> torch.Tensor:
    """A hash of each row of int64 [B, T]: int64 [B]. Integer arithmetic wraps around."""
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    mixed = (ids + 1 + salt) * 0x9E3779B97F4A7C1 + place * 0x1F83D9ABFB41BD6
    return ((mixed ^ (mixed >> 29)) * 0x3C6EF372FE94F82).sum(-1)


def noise_for(program: Program, seed: int | None) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
    """A function of a call's arguments that draws the scorers' noise: for each scorer, uniform float32 [B, T]."""
    shapes = [runtime_sizes(program, program[TokenAxes].tokens[i]) for i in program[Rewrite].noisy]
    device = device_of(program)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return lambda args: tuple(torch.rand(shape(args), device=device, generator=generator) for shape in shapes)


def unknown_tokens(what: str) -> GraphNotSupported:
    return GraphNotSupported(
        f"A fragment of the model has {what}, but no attention, and no input from a fragment that has one, so its "
        "token axis is not known.",
        "Compile it together with the last attention, or leave it uncompiled and compute the loss on the given rows.",
    )


def is_activation(value: Any) -> bool:
    """True for a tensor with gradient that another graph, or plain Python, computed."""
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
