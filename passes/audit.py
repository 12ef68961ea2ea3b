"""Saved-tensor audit: what autograd would keep between forward and backward, edge by edge, on the partitioned graph.

The nodes of a graph carry a kind in ``meta["custom"]["tokenseek"]`` that survives AOTAutograd, so an edge of the
partitioned graph is explained by the operation that it comes from, not by its size.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing

from .fake import fake_mode_of
from .program import Program, where
from .saving import PLAIN, Saving, partitioning, saved_by

#: Kinds of edges that hold all tokens on purpose.
EXPLAINED = ("keys/values", "block inputs", "logits", "barrier", "scores", "rows", "select", "scoring")


@dataclass(frozen=True)
class Edge:
    """One tensor saved for backward."""

    name: str
    kind: str
    shape: tuple
    dtype: torch.dtype
    place: str

    @property
    def bytes(self) -> int:
        return torch.Size(int(size) for size in self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Audit:
    """The saved edges of a partitioned forward graph."""

    edges: tuple[Edge, ...]

    @property
    def bytes(self) -> int:
        return sum(edge.bytes for edge in self.edges)

    def by_kind(self) -> dict[str, int]:
        """Bytes by kind: rows, keys/values, logits, barrier, scores, activations."""
        counts: Counter[str] = Counter()
        for edge in self.edges:
            counts[edge.kind] += edge.bytes
        return dict(counts)

    @property
    def unexplained(self) -> tuple[Edge, ...]:
        """Floating-point edges of a rewritten graph that come from the seek stream: activations of all tokens."""
        return tuple(edge for edge in self.edges if edge.kind not in EXPLAINED and edge.dtype.is_floating_point)


@dataclass(frozen=True)
class AuditSaved:
    """Partition the rewritten graph and list its saved edges. Reads ``rewrite``; writes ``audit``."""

    saving: Saving = PLAIN
    name: str = "saved tensors"

    def run(self, program: Program) -> Program:
        assert program.rewrite is not None
        return replace(program, audit=saved_edges(program.rewrite.module, program.rewrite.inputs, self.saving))

    def check(self, program: Program) -> None:
        """Nothing is refused: a full-length activation is reported (``Audit.unexplained``), it is not wrong."""


def saved_edges(module: fx.GraphModule, inputs: Sequence[Any], saving: Saving = PLAIN) -> Audit:
    """What Inductor's partitioner saves for the backward of ``module``; parameters and inputs are not counted."""
    found: list[Edge] = []

    def look(graph: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        metadata = TracingContext.get().fw_metadata
        if not kwargs.get("is_backward", False) and not found and metadata is not None:
            found.extend(map(_edge, saved_by(graph, metadata.num_forward)))
        return graph.forward

    from torch._inductor.compile_fx import compile_fx

    mode = fake_mode_of(inputs)
    uncached = torch._functorch.config.patch(
        enable_autograd_cache=False
    )  # a cached graph would not be shown to ``look``
    with tracing(TracingContext.try_get() or TracingContext(mode)), partitioning(saving), uncached:
        compile_fx(copy.deepcopy(module), list(inputs), inner_compile=look)
    return Audit(tuple(found))


def _edge(node: fx.Node) -> Edge:
    value = node.meta["val"]
    kind = node.meta.get("custom", {}).get("tokenseek", "activations")
    return Edge(node.name, kind, tuple(value.shape), value.dtype, where(node))
