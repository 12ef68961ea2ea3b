"""Saving: which values of the ditch stream are kept for backward, and which are computed again there.

AOTAutograd's partitioner saves the smallest set of tensors from which backward can compute the rest without repeating a matrix
product or an attention. Here it is told of blocks (segments of the rewritten graph) that are repeated all the same, and of
random operations, which never are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from . import context
from .rules.op import is_random
from .streams import LAYOUT
from .tags import REMADE

FOLLOWS = {*LAYOUT, torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default}
Graphs = tuple[fx.GraphModule, fx.GraphModule]


@contextmanager
def partitioning(partition: Partition) -> Iterator[None]:
    """How segments of rewritten graphs are partitioned: whatever is cheap to compute again is not saved (on the selected rows
    nearly everything is)."""
    cheap = torch._functorch.config.patch(aggressive_recomputation=True)
    with cheap, torch._inductor.config.patch(custom_partitioner_fn=partition):
        yield


class Partition(CustomPartitionerFn):
    """Cuts a joint graph into forward and backward; ``again``: the forward is computed again in backward, nothing is saved but what
    enters the segment. ``kv``: what is kept of keys and values, among the inputs those at ``places`` (``context.py``)."""

    def __init__(self, again: bool = False, kv: str = "keep", places: tuple[int, ...] = ()) -> None:
        self.again, self.kv, self.places = again, kv, places

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> Graphs:
        keep_random(gm.graph)
        repeat_remade(gm.graph)
        if self.again:
            repeat(gm.graph)
        elif self.kv == "fp8":
            repeat_attention(gm.graph, self.places)
        with without_generator_states():
            graphs = partitioners.min_cut_rematerialization_partition(gm, joint_inputs, **options)
        if self.kv in ("fp8", "offload"):
            context.keep(self.kv, self.places, *graphs, options["num_fwd_outputs"])
        return graphs

    def uuid(self) -> Any:
        """What AOTAutograd's cache tells two partitions apart by."""
        return get_hash_for_files((__file__, context.__file__)), self.again, self.kv, self.places


def partition_of(part: fx.GraphModule, taken: Sequence[Any], again: bool = False, kv: str = "keep") -> Partition:
    """That of a segment with these inputs."""
    return Partition(again, kv, context.inputs_of(part, taken))


def keep_random(graph: fx.Graph) -> None:
    """Mark what would come out differently a second time: dropout in backward would not be that of the forward."""
    for node in graph.nodes:
        if is_random(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def repeat(graph: fx.Graph) -> None:
    """Mark the operations of the forward to be computed again in backward."""
    repeated: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_repeatable(node, repeated):
            repeated.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0


def repeat_attention(graph: fx.Graph, places: Sequence[int]) -> None:
    """Mark what reads the keys and values at these places of the inputs. Shares in backward are exp(scores - log-sum-exp): of rounded
    keys and the exact log-sum-exp they would not sum to 1, and be off without bound where scores are large."""
    inputs = graph.find_nodes(op="placeholder")
    context, readers = {inputs[place] for place in places}, set[fx.Node]()
    for node in graph.nodes:
        if partitioners._has_tag_is_forward(node) and not {*node.all_input_nodes}.isdisjoint(context):
            (context if node.target in LAYOUT else readers).add(node)
        elif node.target is operator.getitem and node.args[0] in readers:
            readers.add(node)
    for node in readers | context - {*inputs}:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta["ac_graph_id"] = 0


def repeat_remade(graph: fx.Graph) -> None:
    """Mark what makes keys and values again, and what only casts or lays them out."""
    made: set[fx.Node] = set()
    for node in graph.nodes:
        if not partitioners._has_tag_is_forward(node) or node.op == "placeholder":
            continue
        follows = node.target in FOLLOWS and {*node.all_input_nodes} <= made
        if follows or node.meta.get("custom", {}).get("tokenseek") == REMADE:
            made.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0


def _is_repeatable(node: fx.Node, repeated: set[fx.Node]) -> bool:
    """Computed in the forward from inputs and from what is repeated: what is made of constants and of values that all blocks share
    (masks) is one value for all of them. The head gives its backward a number for each row, and has no other use there."""
    if (
        not partitioners._has_tag_is_forward(node)
        or is_random(node)
        or node.target is torch.ops.tokenseek_fx.head_loss.default
    ):
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
