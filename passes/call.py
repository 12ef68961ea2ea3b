"""What a rows rule sees: one operation of the ditch stream, with its operands restricted or in full."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .factors import Dim
from .rules.op import bind, is_tensor, operands_of

if TYPE_CHECKING:
    from .attend import Attending
    from .ditch import Streams
    from .geometry import Geometry


@dataclass(frozen=True)
class Call:
    """One operation. ``dim``: the dim of its result whose rows are tokens (None: the result has no rows)."""

    node: fx.Node
    streams: Streams
    dim: int | None

    @property
    def target(self) -> Any:
        return self.node.target

    @cached_property
    def geometry(self) -> Geometry:
        """That of the token axis of its rows (of a result without rows: of its first operand with rows)."""
        having = (node for node in (self.node, *self.operands) if self.streams.axes.axis_of(node) is not None)
        return self.streams.geometry_of(next(having))

    @cached_property
    def operands(self) -> list[fx.Node]:
        return operands_of(self.node)

    def __getitem__(self, name: str) -> Any:
        """An argument by its schema name; a tensor in full."""
        return self._mapped(bind(self.node)[name], self.streams.full)

    def arguments_but(self, *names: str) -> dict[str, Any]:
        """The arguments by schema name, but those that the rule gives itself; tensors in full."""
        return {name: self[name] for name in bind(self.node) if name not in names}

    def rank(self, operand: int) -> int:
        return self.operands[operand].meta["val"].ndim

    @property
    def shape(self) -> list:
        """The shape of the result restricted to its rows."""
        assert self.dim is not None
        return self.geometry.row_shape(self.streams.seek[self.node].shape, self.dim)

    @property
    def carries_rows(self) -> bool:
        """True when a row of the result depends on the same row of some operand, and on the others in full."""
        return any(self.carried(i) is not None for i in range(len(self.operands)))

    def full(self, operand: int) -> torch.Tensor:
        return self.streams.full(self.operands[operand])

    def rows(self, operand: int) -> torch.Tensor:
        """The operand restricted where it carries the row of the result, else all that the row looks at."""
        dim = self.carried(operand)
        return self.context(operand) if dim is None else self._restricted(operand, dim)

    def context(self, operand: int) -> torch.Tensor:
        """An operand that a row looks at as a whole: keys, values."""
        return self.streams.context(self.operands[operand])

    def own_rows(self, operand: int) -> torch.Tensor:
        """The operand restricted along its own row dim: for results without rows (losses)."""
        node = self.operands[operand]
        dim = self.streams.axes.row_dim(node)
        return self.streams.full(node) if dim is None else self.streams.rows(node, dim)

    @property
    def args(self) -> tuple:
        return self._call_arguments[0]

    @property
    def kwargs(self) -> dict:
        return self._call_arguments[1]

    def causal_mask(self) -> torch.Tensor:
        """True where a row of the query (operand 0) stands at or after a key (operand 1): bool ``[..., row, key]``."""
        streams, (query, key) = self.streams, self.operands[:2]
        labels, device = streams.axes.of(query), self.geometry.indices.device

        def compare() -> torch.Tensor:
            position = torch.arange(self.geometry.tokens, device=device).unsqueeze(-1)
            like, whole = (*labels[:-1], ()), streams.seek[query]
            rows = streams.aligned_rows(position, (labels[-2], ()), 0, like, whole, len(labels))
            return rows >= torch.arange(streams.seek[key].shape[-2], device=device)

        return streams.once(("causal", streams.axes.of(key)[-2], *self._place_of_batch(query)), compare)

    @property
    def attending(self) -> Attending | None:
        """How this attention looks at keys and values by position, where it can, and where no more than its rows are live."""
        found = self.streams.program.attending.get(self.node)
        if found is None or any(map(self.streams.keeps_live, (found.key, found.value))):
            return None
        return found

    def attend(self) -> torch.Tensor:
        """The rows of this attention by position."""
        found, streams = self.attending, self.streams
        assert found is not None
        sinks = {} if found.sinks is None else {found.sinks: streams.full(found.sinks)}
        values = ChainMap(sinks, streams.looked_at)
        return found(values, streams.rows(found.query, 2), self.geometry.indices, self._live_keys())

    def _live_keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The selected rows of keys and values, and their places [B, m] (``None``: none of them is trained)."""
        found, streams = self.streams.program.attending[self.node], self.streams
        if streams.live.isdisjoint((found.key, found.value)):
            return None
        return streams.rows(found.key, 2), streams.rows(found.value, 2), streams.geometry_of(found.key).indices

    @property
    def in_full(self) -> tuple[tuple, dict]:
        """The arguments of the call with every operand in full."""
        return self._mapped((self.node.args, self.node.kwargs), self.streams.full)

    @property
    def in_context(self) -> tuple[tuple, dict]:
        """The arguments of the call with every operand as the rows look at it."""
        return self._mapped((self.node.args, self.node.kwargs), self.streams.context)

    # -- how operands are restricted ----------------------------------------------------------------------------------

    @cached_property
    def _call_arguments(self) -> tuple[tuple, dict]:
        counter = iter(range(len(self.operands)))
        return self._mapped((self.node.args, self.node.kwargs), lambda _: self.rows(next(counter)))

    def _mapped(self, value: Any, tensor: Callable[[fx.Node], Any]) -> Any:
        def leaf(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            return tensor(arg) if is_tensor(arg) else self.streams.seek[arg]

        return pytree.tree_map(leaf, value)

    def carried(self, operand: int) -> int | None:
        """The operand's dim that carries the token rows of the result."""
        if self.dim is None:
            return None
        axes, node = self.streams.axes, self.operands[operand]
        dim = axes.carried(self.node, operand, self.dim)
        return dim if dim is not None and dim in axes.token_dims(node) else None

    def _restricted(self, operand: int, dim: int) -> torch.Tensor:
        streams, node = self.streams, self.operands[operand]
        if node in streams.live:
            return self._rows_of(node, dim)
        return streams.once(
            (streams.first_alike[node], dim, *self._place_of_batch(self.node)), lambda: self._rows_of(node, dim)
        )

    def _place_of_batch(self, node: fx.Node) -> tuple:
        """What rows depend on that all instances share: they get the batch axis where ``node`` has it."""
        labels = self.streams.axes.of(node)
        at = self.geometry.axis.batch_dim_of(labels)
        return (len(labels), at, None if at is None else labels[at])

    def _rows_of(self, node: fx.Node, dim: int) -> torch.Tensor:
        streams, labels = self.streams, self.streams.axes.of(self.node)
        if streams.axes.has_rows(node):
            return streams.rows(node, dim)
        return streams.aligned_rows(
            streams.full(node), streams.axes.of(node), dim, labels, streams.seek[self.node], len(labels)
        )


def pad_left(labels: tuple[Dim, ...], rank: int) -> tuple[Dim, ...]:
    return ((),) * (rank - len(labels)) + labels
