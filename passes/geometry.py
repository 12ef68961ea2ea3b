"""Where rows stand: gathering the selected rows of a value, and putting them back, by the factors of its dims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import GraphNotSupported
from .factors import Axes, Dim
from .token_axes import TokenAxes, find


@dataclass(frozen=True)
class Geometry:
    """The selection ``indices`` ([B, k] int64; [1, k] for one instance) with the sizes of batch and token axis."""

    axes: TokenAxes
    indices: torch.Tensor
    batch: Any
    tokens: Any

    @property
    def kept(self) -> Any:
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
        """``shape`` with the token axis of ``dim`` cut to the kept rows."""
        return [size // self.tokens * self.kept if i == dim else size for i, size in enumerate(shape)]

    def _factored(self, value: torch.Tensor, labels: Axes, dim: int) -> tuple[list, torch.Tensor, int]:
        """Sizes of ``value`` with batch and token axis as dims of their own, the gather index, and the token's place."""
        pieces = [piece for i, label in enumerate(labels) for piece in self._pieces(label, value.shape[i], i == dim)]
        kinds, sizes = [kind for kind, _ in pieces], [size for _, size in pieces]
        at = kinds.index("token")
        index = self.indices
        if "batch" in kinds:
            index = index if kinds.index("batch") < at else index.t()
        elif self.axes.batch:
            raise GraphNotSupported("A value has token rows but no batch axis to select them by.")
        shape = [self.batch if kind == "batch" else self.kept if kind == "token" else 1 for kind in kinds]
        full = [self.kept if kind == "token" else size for kind, size in pieces]
        return sizes, index.reshape(shape).expand(full), at

    def _pieces(self, label: Dim, size: Any, has_rows: bool) -> list[tuple[str, Any]]:
        """Cut one dim at its batch and (where ``has_rows``) token factors; a dim with neither stays whole."""
        batch, token = self.axes.batch, self.axes.token
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
