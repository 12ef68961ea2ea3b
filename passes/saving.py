"""Saving: which values of the ditch stream are kept for backward, and which are computed again there.

AOTAutograd's partitioner saves the smallest set of tensors from which backward can compute the rest without repeating a matrix
product or an attention. Here it is told of whole blocks that are repeated all the same, and of random operations, which
never are. Nodes of the traced streams carry their kind and the number of their block in ``meta["custom"]``, which survives
AOTAutograd.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from .errors import ConfigError
from .program import Program
from .rules.op import bind, bytes_hint
from .tail import head_input

Graphs = tuple[fx.GraphModule, fx.GraphModule]


@dataclass(frozen=True)
class Saving:
    """What is kept between forward and backward.

    ``recompute``: "none"; "rows": of the ditch stream only the rows that enter each block and the head, all else is computed
    again in backward; a number of bytes: as many blocks are computed again as it takes to save no more than that. The first
    blocks are, since their values are held the longest.
    """

    recompute: str | int = "none"


PLAIN = Saving()


def block_numbers(program: Program) -> dict[fx.Node, int]:
    """The number of the block that every node belongs to: it rises behind the input of each block but the first of a token axis
    (what comes before that is cheap) and behind the input of the head."""
    assert program.blocks is not None
    entries = program.blocks.entries
    inputs = [[node for node in stream if node in entries] for stream in program.blocks.streams.values()]
    ends = {node for stream in inputs for node in stream[1:]} | {head_input(program)}
    numbers, number = {}, 0
    for node in program.graph.nodes:
        numbers[node] = number
        number += node in ends
    return numbers


@contextmanager
def partitioning(saving: Saving) -> Iterator[None]:
    """How rewritten graphs are partitioned: whatever is cheap to compute again is not saved. On the selected rows nearly
    everything is, and keys and values are saved before their heads are repeated."""
    cheap = torch._functorch.config.patch(aggressive_recomputation=True)
    with cheap, torch._inductor.config.patch(custom_partitioner_fn=Partition(saving)):
        yield


class Partition(CustomPartitionerFn):
    """Cuts a joint graph into forward and backward.

    Raises:
        ConfigError: more is saved than ``saving.recompute`` allows even where every block is computed again.
    """

    def __init__(self, saving: Saving) -> None:
        self.saving = saving

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> Graphs:
        keep_random(gm.graph)
        blocks = sorted({block_of(node) for node in gm.graph.nodes} - {None})

        def partition(graph: fx.Graph, count: int) -> Graphs:
            """With the first blocks computed again, so many of them."""
            repeat(graph, {*blocks[:count]})
            module = fx.GraphModule(gm, graph)
            with without_generator_states():
                return partitioners.min_cut_rematerialization_partition(module, joint_inputs, **options)

        def saved(count: int) -> int:
            forward, _ = partition(copied(gm.graph), count)
            return sum(map(bytes_hint, saved_by(forward, options["num_fwd_outputs"])))

        return partition(gm.graph, self._count(len(blocks), saved))

    def uuid(self) -> Any:
        """What AOTAutograd's cache tells two partitions apart by."""
        return get_hash_for_files((__file__,)), self.saving

    def _count(self, blocks: int, saved: Callable[[int], int]) -> int:
        """How many blocks to compute again; ``saved``: the bytes that are saved then."""
        budget = self.saving.recompute
        if isinstance(budget, str):
            return blocks if budget == "rows" else 0
        count = bisect_left(range(blocks + 1), -budget, key=lambda count: -saved(count))
        if count > blocks:
            raise ConfigError(
                f"recompute={budget}: {saved(blocks)} bytes are saved for backward even where every block is computed again. "
                "Allow so many, or keep fewer tokens."
            )
        return count


def block_of(node: fx.Node) -> int | None:
    """The number of the block whose rows a node computes; ``None`` outside of the ditch stream."""
    return node.meta.get("custom", {}).get("tokenseek_block")


def keep_random(graph: fx.Graph) -> None:
    """Mark what would come out differently a second time: dropout in backward would not be that of the forward."""
    for node in graph.nodes:
        if is_random(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def is_random(node: fx.Node) -> bool:
    """True for an operation that draws (an attention without dropout does not)."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and bind(node).get("dropout_p") != 0


def repeat(graph: fx.Graph, blocks: set[int]) -> None:
    """Mark the operations of these blocks to be computed again in backward."""
    repeated: set[fx.Node] = set()
    for node in graph.nodes:
        if block_of(node) in blocks and _is_repeatable(node, repeated):
            repeated.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = block_of(node)  # what a later block reads of this one is saved


def _is_repeatable(node: fx.Node, repeated: set[fx.Node]) -> bool:
    """Computed in the forward from inputs and from what is repeated: what is made of constants and of values that all blocks share
    (masks) is one value for all of them."""
    if not partitioners._has_tag_is_forward(node) or is_random(node):
        return False
    if node.target is operator.getitem:
        return node.args[0] in repeated
    return any(arg in repeated or arg.op == "placeholder" for arg in node.all_input_nodes)


@contextmanager
def without_generator_states() -> Iterator[None]:
    """The partitioner would save a state of the random generator for every attention that is computed again, whether it draws
    or not; those that draw are not computed again here."""
    before = partitioners.has_recomputable_rng_ops
    partitioners.has_recomputable_rng_ops = lambda module: False
    try:
        yield
    finally:
        partitioners.has_recomputable_rng_ops = before


def saved_by(forward: fx.GraphModule, outputs: int) -> list[fx.Node]:
    """The tensors that a forward graph with so many outputs of its own saves, each once, without inputs and views of them."""
    return [node for node in dict.fromkeys(forward.graph.output_node().args[0][outputs:]) if _is_saved(node)]


def _is_saved(node: Any) -> bool:
    while isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op != "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have metadata of their own."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new
