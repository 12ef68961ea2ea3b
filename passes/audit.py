"""Saved-tensor audit: what autograd would keep between forward and backward, edge by edge, on the partitioned graph.

The nodes of a graph carry a kind in ``meta["custom"]["tokenseek"]`` that survives AOTAutograd, so an edge of the
partitioned graph is explained by the operation that it comes from, not by its size.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing

from .context import ON_HOST
from .errors import ConfigError
from .program import Program, where
from .remake import PRODUCTS
from .rules.op import bytes_hint, is_tensor, made_by
from .saving import Partition, partition_of, partitioning
from .split import Segment, Segments
from .tags import REMADE
from .token_axes import SDPA

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
    """The saved edges of a partitioned forward graph; ``again``: the share of its segments that backward computes again."""

    edges: tuple[Edge, ...]
    again: float = 0.0

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
    """Partition every segment of the rewritten graph and list what they save. Reads ``segments``; writes ``audit``."""

    recompute: str | int | None = "none"
    kv: str = "keep"
    room: int = 0
    name: str = "saved tensors"

    def run(self, program: Program) -> Program:
        segments = program.segments
        assert segments is not None
        again = computed_again(segments, self.recompute, self.kv, self.room)
        return replace(program, audit=saved_in(segments, again, self.kv))

    def check(self, program: Program) -> None:
        """Nothing is refused: a full-length activation is reported (``Audit.unexplained``), it is not wrong."""


def saved_in(segments: Segments, again: int, kv: str = "keep") -> Audit:
    """What segments save, where the first ``again`` of them are computed again in backward, and keys and values are kept as
    ``kv`` says. What waits in host memory does not count."""
    found: dict[Any, Edge | None] = dict.fromkeys(segments.placeholders)
    parts = {part: number for number, part in enumerate(segments.parts)}

    def look(part: Segment, taken: list, _: Sequence[Any]) -> None:
        forward = partitioned(part.run, taken, partition_of(part.run, taken, parts[part] < again, kv))
        given = dict(zip(forward.outputs, part.gives, strict=True))
        takes = dict(zip(forward.inputs, _distinct(part.takes, taken), strict=False))
        for node in forward.saved:
            base = _base(node)
            if node.meta.get("custom", {}).get("tokenseek") == ON_HOST:
                continue
            key = _base(takes.get(base, given.get(base, base)))
            found.setdefault(key, _edge(takes.get(base, node)))

    segments.on_examples(look)
    return Audit(tuple(edge for edge in found.values() if edge is not None), again / len(segments.parts))


def computed_again(segments: Segments, recompute: str | int | None, kv: str = "keep", room: int = 0) -> int:
    """Of how many segments, from the first, the forward is computed again in backward. "none", "rows": all; or bytes: as
    many as it takes to save no more than that. ``None``: all but the last ones whose products take less than ``room`` bytes. The first
    are, since their values are held the longest.

    Raises:
        ConfigError: more is saved even where every segment is computed again.
    """
    every = len(segments.parts)
    if recompute is None:
        return every - _fitting(segments.parts[1:], room)
    if isinstance(recompute, str):
        return every if recompute == "rows" else 0
    count = bisect_left(range(every + 1), -recompute, key=lambda count: -saved_in(segments, count, kv).bytes)
    if count > every:
        raise ConfigError(
            f"recompute={recompute}: {saved_in(segments, every, kv).bytes} bytes are saved for backward even where every block is "
            "computed again. Allow so many, or keep fewer tokens."
        )
    return count


def _fitting(parts: Sequence[Segment], room: int) -> int:
    """The results of how many of the last parts' matrix products and attentions, which is what is kept of them, take less than that."""
    sizes = [sum(bytes_hint(node) for node in part.run.graph.nodes if _is_kept(node)) for part in parts]
    return sum(total < room for total in accumulate(reversed(sizes)))


def _is_kept(node: fx.Node) -> bool:
    return node.target in (*PRODUCTS, SDPA) or "selected_attention" in str(node.target)


def saved_edges(module: fx.GraphModule, inputs: Sequence[Any]) -> Audit:
    """What Inductor's partitioner saves for the backward of ``module``; parameters and inputs are not counted."""
    with tracing(TracingContext.try_get() or TracingContext(detect_fake_mode(inputs))):
        forward = partitioned(module, inputs, Partition())
    bases = {_base(node): node for node in forward.saved}
    return Audit(tuple(_edge(node) for base, node in bases.items() if base not in forward.inputs))


@dataclass(frozen=True)
class Forward:
    """What a partitioned forward graph takes (no tensor twice), gives and saves; each without the views around it."""

    inputs: list[fx.Node]
    outputs: list[Any]
    saved: list[fx.Node]


def partitioned(module: fx.GraphModule, inputs: Sequence[Any], partition: Partition) -> Forward:
    """What a partition makes of the forward of ``module``."""
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

    # a cached graph would not be shown to ``look``
    with partitioning(partition), torch._functorch.config.patch(enable_autograd_cache=False):
        compile_fx(copy.deepcopy(module), list(inputs), inner_compile=look)
    return found[0]


def _base(node: Any) -> Any:
    """What a view is one of."""
    while isinstance(node, fx.Node):
        made = made_by(node)
        if not isinstance(made.target, torch._ops.OpOverload) or not made.target.is_view:
            break
        node = made.args[0]
    return node


def _distinct(keys: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The keys without those whose tensor is that of an earlier one."""
    return [*{id(x) if isinstance(x, torch.Tensor) else key: key for key, x in zip(keys, values, strict=True)}.values()]


def _edge(node: fx.Node) -> Edge:
    """A view keeps all that it is one of."""
    value = _base(node).meta["val"]
    return Edge(node.name, kind_of(node), tuple(value.shape), value.dtype, where(node))


def kind_of(node: fx.Node) -> str:
    """What a saved value is counted as; of a value of the seek stream, the kind of what reads it."""
    kinds = [reader.meta.get("custom", {}).get("tokenseek") for reader in (node, *node.users)]
    return "block inputs" if REMADE in kinds else next(filter(None, kinds), "activations")
