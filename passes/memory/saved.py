"""Saved tensors: what autograd keeps between forward and backward, edge by edge of the partitioned graph.

Nodes carry a kind that survives AOTAutograd (``graph/kinds.py``), so an edge of the partitioned graph is explained by
the operation that it comes from, not by its size.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing

from ..graph.kinds import Kind, Mark, kind_of, mark_of
from ..graph.nodes import is_tensor, made_by
from ..graph.program import where
from ..keep.kv_modes import KEEP, KVMode
from ..lower.split import Segment, Segments
from .partition import Partition, partition_of, partitioning

#: Kinds of edges that may hold all tokens.
EXPLAINED = frozenset(Kind) - {Kind.SEEK, Kind.ACTIVATIONS}


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
    """The tensors that a partitioned forward graph saves.

    ``recomputed_share``: the share of its segments that backward recomputes.
    """

    edges: tuple[Edge, ...]
    recomputed_share: float = 0.0

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


class SavedTensors:
    """The tensors that segments save; no two partitions of the same graph are made."""

    def __init__(self, segments: Segments, kv: KVMode = KEEP) -> None:
        self.segments, self.kv = segments, kv
        self.known: dict[Any, tuple[Forward, fx.GraphModule]] = {}

    def if_recomputed(self, recomputed: int) -> Audit:
        """The saved tensors if backward recomputes the first ``recomputed`` segments, without those in host memory."""
        segments = self.segments
        found: dict[Any, Edge | None] = dict.fromkeys(segments.placeholders)
        numbers = {segment: number for number, segment in enumerate(segments.segments)}

        def look(segment: Segment, taken: list, _: Sequence[Any]) -> None:
            number = numbers[segment]
            forward, alike = self._partitioned(segment.run, taken, number < recomputed)
            places = _places(alike, segment.run)
            given = dict(zip(forward.outputs, segment.gives, strict=True))
            takes = dict(zip(forward.inputs, _distinct(segment.takes, taken), strict=False))
            for node in forward.saved:
                base = _base(node)
                if mark_of(node) is Mark.ON_HOST:
                    continue
                value = _base(takes.get(base, given.get(base, (number, base))))
                found.setdefault(value, _edge(takes[base]) if base in takes else _edge(node, places))

        segments.on_examples(look)
        return Audit(tuple(edge for edge in found.values() if edge is not None), recomputed / len(segments.segments))

    def _partitioned(self, run: fx.GraphModule, taken: list, recompute: bool) -> tuple[Forward, fx.GraphModule]:
        """The forward of a segment, and the graph that was partitioned: this one or an equal one."""
        key = _likeness(run, taken, recompute)
        if key not in self.known:
            self.known[key] = partitioned(run, taken, partition_of(run, taken, recompute, self.kv)), run
        return self.known[key]


def saved_edges(module: fx.GraphModule, inputs: Sequence[Any]) -> Audit:
    """The tensors that Inductor's partitioner saves for the backward of ``module``, without parameters and inputs."""
    with tracing(TracingContext.try_get() or TracingContext(detect_fake_mode(inputs))):
        forward = partitioned(module, inputs, Partition())
    bases = {_base(node): node for node in forward.saved}
    return Audit(tuple(_edge(node) for base, node in bases.items() if base not in forward.inputs))


@dataclass(frozen=True)
class Forward:
    """The inputs, outputs and saved values of a partitioned forward graph, without the views around them.

    An input that is passed twice occurs once.
    """

    inputs: list[fx.Node]
    outputs: list[Any]
    saved: list[fx.Node]


def partitioned(module: fx.GraphModule, inputs: Sequence[Any], partition: Partition) -> Forward:
    """The forward of ``module`` as this partition cuts it."""
    found: list[Forward] = []

    def look(graph: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        metadata = TracingContext.get().fw_metadata
        if not kwargs.get("is_backward", False) and not found and metadata is not None:
            outputs: Any = graph.graph.output_node().args[0]
            given = outputs[metadata.num_mutated_inp_runtime_indices :][: metadata.num_outputs]
            saved = [node for node in dict.fromkeys(outputs[metadata.num_forward :]) if is_tensor(node)]
            found.append(Forward(graph.graph.find_nodes(op="placeholder"), [_base(x) for x in given], saved))
        return graph.forward

    from torch._inductor.compile_fx import compile_fx

    # ``look`` would not be called with a cached graph
    with partitioning(partition), torch._functorch.config.patch(enable_autograd_cache=False):
        compile_fx(copy.deepcopy(module), list(inputs), inner_compile=look)
    return found[0]


def _base(node: Any) -> Any:
    """The value that a view is a view of."""
    while isinstance(node, fx.Node):
        made = made_by(node)
        if not isinstance(made.target, torch._ops.OpOverload) or not made.target.is_view:
            break
        node = made.args[0]
    return node


def _distinct(keys: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The keys without those whose tensor is that of an earlier key."""
    return [*{id(x) if isinstance(x, torch.Tensor) else key: key for key, x in zip(keys, values, strict=True)}.values()]


def _likeness(module: fx.GraphModule, inputs: Sequence[Any], recompute: bool) -> Any:
    """A key that is equal for graphs with equal partitions: equal blocks are partitioned once."""
    first: dict[Any, int] = {}
    forms = [
        (first.setdefault(id(x), i), str(x.shape), str(x.stride()), x.dtype, x.device, x.requires_grad)
        if isinstance(x, torch.Tensor)
        else str(x)
        for i, x in enumerate(inputs)
    ]
    return module.code, tuple(forms), tuple((mark_of(n), kind_of(n)) for n in module.graph.nodes), recompute


def _places(alike: fx.GraphModule, module: fx.GraphModule) -> dict[str, str]:
    """The places of a graph, by those of an equal graph."""
    return {where(one): where(other) for one, other in zip(alike.graph.nodes, module.graph.nodes, strict=True)}


def _edge(node: fx.Node, places: Mapping[str, str] = MappingProxyType({})) -> Edge:
    """The edge of a saved node; a view keeps its whole base.

    ``places``: the places of an equal graph, by those of this one.
    """
    value, place = _base(node).meta["val"], where(node)
    return Edge(node.name, kind_of_saved(node), tuple(value.shape), value.dtype, places.get(place, place))


def kind_of_saved(node: fx.Node) -> str:
    """The kind of a saved value; for a value of the seek stream, that of its readers."""
    readers = (node, *node.users)
    if any(mark_of(reader) is Mark.RECOMPUTED for reader in readers):
        return Kind.BLOCK_INPUTS
    return next(filter(None, map(kind_of, readers)), Kind.ACTIVATIONS)
