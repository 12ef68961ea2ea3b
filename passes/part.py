"""Part: some operations of a graph re-executed on some rows, from the rows of what they are computed from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import GraphNotSupported
from .fake import fake_mode_of
from .geometry import Geometry
from .program import Program
from .streams import Streams


def trace_whole(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """The operations of a function below autograd, where its own backward is recorded too."""
    with warnings.catch_warnings(), fake_mode_of(inputs):
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]  # no tensor may be two inputs of a trace
        with enable_python_dispatcher():  # composite operations in Python: in C++ some can't take symbolic sizes
            return make_fx(function, tracing_mode="real")(*inputs)


class Part(Streams):
    """The rows stream of ``nodes``, started from ``rows`` of other nodes; nothing of it exists for all tokens. ``known``: values
    of nodes that are read as a whole."""

    def __init__(
        self,
        program: Program,
        nodes: Iterable[fx.Node],
        known: Mapping[fx.Node, Any],
        geometry: Geometry,
        rows: Mapping[fx.Node, Tensor],
    ) -> None:
        activity = replace(program.activity, live=frozenset((*nodes, *rows)))
        super().__init__(replace(program, activity=activity), _Shapes(known), [geometry], program.inputs, [])
        self._rows.update(rows)
        self._switches = fx.Interpreter(program.module)  # switched for real, not recorded

    def _compute(self, node: fx.Node) -> None:
        if node not in self._rows:
            super()._compute(node)

    def full(self, node: fx.Node) -> Any:
        if node in self.live:
            raise GraphNotSupported("An operation on a part of the tokens looks at the others.", "", node)
        return self.seek[node]

    def rows_of(self, node: fx.Node) -> Tensor:
        """The rows of one of the nodes."""
        return self._rows[node]


class _Shapes(dict):
    """Values of nodes; for one that is not computed, its example (only its shape is asked for)."""

    def __missing__(self, node: fx.Node) -> Any:
        return node.meta["val"]
