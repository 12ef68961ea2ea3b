"""Row subgraph: re-execute some operations of a graph on some rows, from the rows of their operands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from ..analysis.activity import Activity
from ..analysis.moved_rows import MovedRows
from ..analysis.row_index import RowIndex
from ..graph.errors import GraphNotSupported
from ..graph.fake import fake_mode_of
from ..graph.program import Program
from ..keep.frozen_rows import FrozenRows
from ..keep.recompute_kv import KVRecompute
from .autocast import Autocast
from .ditch_stream import DitchStream


def trace_whole(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace a function below autograd, so that its own backward is recorded too."""
    with warnings.catch_warnings(), fake_mode_of(inputs):
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]  # inputs of a trace must be distinct
        with enable_python_dispatcher():  # some composite operations accept symbolic sizes only in Python
            return make_fx(function, tracing_mode="real")(*inputs)


class RowSubgraph(DitchStream):
    """The ditch stream of ``nodes`` alone, without values of all tokens.

    Args:
        program: the program.
        nodes: the operations to execute.
        known: full values of other nodes that they read.
        row_index: the rows.
        rows: the rows of nodes from which they start.
    """

    def __init__(
        self,
        program: Program,
        nodes: Iterable[fx.Node],
        known: Mapping[fx.Node, Any],
        row_index: RowIndex,
        rows: Mapping[fx.Node, Tensor],
    ) -> None:
        activity = replace(program[Activity], live=frozenset((*nodes, *rows)))
        program = program.with_(activity, FrozenRows(), KVRecompute(), MovedRows())
        super().__init__(program, _Shapes(known), [row_index], program.inputs)
        self._rows.update(rows)
        self._autocast = Autocast(fx.Interpreter(program.module))  # executes autocast switches without recording them

    def _compute(self, node: fx.Node) -> None:
        if node not in self._rows:
            super()._compute(node)

    def full(self, node: fx.Node) -> Any:
        if node in self.live:
            raise GraphNotSupported("An operation on some of the tokens reads other tokens.", "", node)
        return self.seek[node]

    def head_of(self, loss: fx.Node) -> None:
        """None: the input of the head need not be among the known values."""

    def rows_of(self, node: fx.Node) -> Tensor:
        """The rows of one of the nodes."""
        return self._rows[node]


class _Shapes(dict):
    """Values of nodes; for one that is not computed, its example value, of which only the shape is read."""

    def __missing__(self, node: fx.Node) -> Any:
        return node.meta["val"]
