"""Row index: gather the selected rows of a value and scatter them back, by the factors of its dims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graph.errors import GraphNotSupported
from ..graph.factors import Axes, Dim
from ..graph.nodes import is_tensor
from ..graph.program import Program
from ..graph.symbolic_sizes import computed, places_of_symbols
from .token_axes import TokenAxes, TokenAxis, find


@dataclass(frozen=True)
class RowIndex:
    """The selected rows of one token axis.

    Args:
        axes: the axes of the graph.
        axis: the token axis.
        indices: int64 [B, k], sorted; [1, k] for one instance.
        batch: the size of the batch axis.
        tokens: the size of the token axis.
        weights: float [B, k], the weights of the rows in the loss; ``None``: all 1.
        round_of: the kept rows of all rounds, if these are the rows of one round.
        places: int64 [m], the places of the rows of a round among those of all rounds.
    """

    axes: TokenAxes
    axis: TokenAxis
    indices: torch.Tensor
    batch: Any
    tokens: Any
    weights: torch.Tensor | None = None
    round_of: RowIndex | None = None
    places: torch.Tensor | None = None

    @property
    def every_round(self) -> RowIndex:
        """The kept rows of all rounds."""
        return self.round_of or self

    def in_round(self, places: torch.Tensor) -> RowIndex:
        """The rows of one round: those at ``places``, int64 [m], among these rows."""
        weights = None if self.weights is None else self.weights.index_select(1, places)
        indices = self.indices.index_select(1, places)
        return replace(self, indices=indices, weights=weights, round_of=self, places=places)

    @property
    def among_kept(self) -> RowIndex:
        """The rows of a round as those of values that have the rows of all rounds."""
        assert self.round_of is not None and self.places is not None
        places = self.places.expand(self.indices.shape[0], -1)
        return replace(self.round_of, indices=places, tokens=self.round_of.kept)

    @property
    def kept(self) -> Any:
        """k, the number of kept rows per instance."""
        return self.indices.shape[1]

    def take(self, value: torch.Tensor, labels: Axes, dim: int) -> torch.Tensor:
        """The selected rows of ``value`` along ``dim``."""
        sizes, index, at = self._factored(value, labels, dim)
        rows = torch.gather(value.reshape(sizes), at, index)
        return rows.reshape(self.row_shape(value.shape, dim))

    def put(self, value: torch.Tensor, rows: torch.Tensor, labels: Axes, dim: int) -> torch.Tensor:
        """``value`` with the selected rows along ``dim`` replaced by ``rows``."""
        sizes, index, at = self._factored(value, labels, dim)
        merged = torch.scatter(value.reshape(sizes), at, index, rows.reshape(index.shape).to(value.dtype))
        return merged.reshape(value.shape)

    def row_shape(self, shape: Any, dim: int) -> list:
        """``shape`` with the token axis of ``dim`` restricted to the kept rows."""
        return [size // self.tokens * self.kept if i == dim else size for i, size in enumerate(shape)]

    def weights_of(self, shape: Sequence[Any], labels: Axes, dim: int) -> torch.Tensor:
        """The weight of every entry of the rows along ``dim`` of a value whose full shape is ``shape``."""
        assert self.weights is not None
        return self.like(self.weights, self.row_shape(shape, dim), labels)

    def like(self, by_token: torch.Tensor, shape: Sequence[Any], labels: Axes) -> torch.Tensor:
        """``by_token`` expanded to a value of ``shape`` along its first token dim.

        Args:
            by_token: [B, n], for all tokens or for the rows.
            shape: the shape of the value.
            labels: the axes of the value.
        """
        dim = next(i for i, label in enumerate(labels) if find(self.axis.token, label) is not None)
        pieces, tokens = self.cut(shape, labels, dim), by_token.shape[1]
        kinds = [kind for kind, _ in pieces]
        by_token = by_token.t() if "batch" in kinds[kinds.index("token") :] else by_token
        sizes = {"batch": self.batch, "token": tokens}
        spread = by_token.reshape([sizes.get(kind, 1) for kind in kinds])
        return spread.expand([sizes.get(kind, size) for kind, size in pieces]).reshape(shape)

    def by_token(self, value: torch.Tensor, labels: Axes, dim: int, tokens: Any = None) -> torch.Tensor:
        """``value`` as [B, T], summed over its other entries (bool: any).

        ``tokens``: the number of its rows; ``None``: all tokens.
        """
        pieces = self.cut(value.shape, labels, dim)
        kinds = [kind for kind, _ in pieces]
        known = tokens is not None
        value = value.reshape([tokens if kind == "token" and known else size for kind, size in pieces])
        others = [i for i, kind in enumerate(kinds) if not kind]
        if others:
            value = value.any(others) if value.dtype is torch.bool else value.sum(others)
        if "batch" not in kinds:
            return value.expand(self.batch, -1)
        return value if kinds.index("batch") < kinds.index("token") else value.t()

    def join(self, chunks: Sequence[torch.Tensor], labels: Axes, dim: int, shape: Sequence[Any]) -> torch.Tensor:
        """The value of this shape whose rows along ``dim`` are those of ``chunks``, concatenated."""
        pieces = self.cut(shape, labels, dim)
        at = [kind for kind, _ in pieces].index("token")
        parts = [chunk.reshape([-1 if i == at else size for i, (_, size) in enumerate(pieces)]) for chunk in chunks]
        return torch.cat(parts, at).reshape(shape)

    def cut(self, shape: Sequence[Any], labels: Axes, dim: int) -> list[tuple[str, Any]]:
        """Cut every dim at its batch factor, and ``dim`` at its token factor: ("batch" | "token" | "", size)."""
        return [piece for i, label in enumerate(labels) for piece in self._pieces(label, shape[i], i == dim)]

    def _factored(self, value: torch.Tensor, labels: Axes, dim: int) -> tuple[list, torch.Tensor, int]:
        """The factored sizes of ``value``, the gather index, and the token dim.

        In the factored sizes, the batch and the token axis are dims of their own.
        """
        pieces = self.cut(value.shape, labels, dim)
        kinds, sizes = [kind for kind, _ in pieces], [size for _, size in pieces]
        if kinds.count("batch") > 1:
            raise GraphNotSupported(
                "A value has the batch axis twice (it compares instances), so its rows belong to no single instance."
            )
        at = kinds.index("token")
        index = self.indices
        if "batch" in kinds:
            index = index if kinds.index("batch") < at else index.t()
        elif self.axis.batch:
            raise GraphNotSupported("A value has token rows but no batch axis to select them by.")
        shape = [self.batch if kind == "batch" else self.kept if kind == "token" else 1 for kind in kinds]
        full = [self.kept if kind == "token" else size for kind, size in pieces]
        return sizes, index.reshape(shape).expand(full), at

    def _pieces(self, label: Dim, size: Any, has_rows: bool) -> list[tuple[str, Any]]:
        """Cut one dim at its batch factor and, if ``has_rows``, its token factor; a dim with neither stays whole."""
        batch, token = self.axis.batch, self.axis.token
        if find(batch, label) is None and not has_rows:
            return [("", size)]
        pieces: list[tuple[str, Any]] = []
        while label:
            if batch and label[: len(batch)] == batch:
                pieces.append(("batch", self.batch))
                label = label[len(batch) :]
            elif label[: len(token)] == token:
                pieces.append(("token" if has_rows else "", self.tokens))
                label = label[len(token) :]
            else:
                pieces.append(("", self.axes.space.size(label[:1])))
                label = label[1:]
        return pieces


def sizes_of(program: Program, axis: TokenAxis, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
    """The sizes (batch, tokens) of a token axis, read from ``values`` that have them as dims.

    The batch size is 1 for one instance.

    Raises:
        GraphNotSupported: no value has the batch axis or the token axis as a dim of its own.
    """
    return tuple(_read(place, values) for place in _places(program, axis))  # type: ignore[return-value]


def example_sizes(program: Program, axis: TokenAxis) -> tuple[Any, Any]:
    """The sizes (batch, tokens) for the example inputs."""
    return sizes_of(program, axis, {node: node.meta.get("val") for node in program.graph.nodes})


def runtime_sizes(program: Program, axis: TokenAxis) -> Callable[[Sequence[Any]], tuple[int, int]]:
    """A function that computes the sizes (batch, tokens) from the inputs of a call.

    Raises:
        GraphNotSupported: a size depends on values.
    """
    places = places_of_symbols(program.inputs)
    batch, tokens = (computed(size, places) for size in example_sizes(program, axis))
    if batch is None or tokens is None:
        raise GraphNotSupported(
            "The batch size or the sequence length depends on values of the inputs.", "Compute it outside the model."
        )
    return lambda args: (batch(args), tokens(args))


def device_of(program: Program) -> torch.device:
    """The device of the program's attentions, or of a value with the token axis."""
    axes = program[TokenAxes]
    values = (node for node in program.graph.nodes if is_tensor(node) and axes.axis_of(node) is not None)
    return next((attention.node for attention in axes.attentions), next(values)).meta["val"].device


_SizeSource = tuple[fx.Node, int] | None


def _places(program: Program, axis: TokenAxis) -> tuple[_SizeSource, _SizeSource]:
    """Values that have the batch axis and the token axis as a dim of their own, inputs first (``None``: no batch)."""
    return _place(program, axis.batch) if axis.batch else None, _place(program, axis.token)


def _place(program: Program, label: Dim) -> _SizeSource:
    for node in filter(is_tensor, program.graph.nodes):
        for dim, other in enumerate(program[TokenAxes].of(node)):
            if other == label:
                return node, dim
    raise GraphNotSupported("No value has the batch axis or the token axis as a dim of its own.")


def _read(place: _SizeSource, values: Mapping[fx.Node, Any]) -> Any:
    return 1 if place is None else values[place[0]].shape[place[1]]
