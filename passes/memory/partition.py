"""Partition: which values of the ditch stream are saved for backward, and which are recomputed.

AOTAutograd's partitioner saves the smallest set of tensors from which backward can compute the rest without repeating a
matrix product or an attention. This partition also recomputes whole segments where the plan says so, and never
recomputes random operations.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from ..graph.kinds import Mark, mark_of
from ..graph.nodes import is_random
from ..graph.op_sets import LAYOUT
from ..keep.kv_modes import KEEP, KVMode
from . import kv_storage

_FOLLOWS = {*LAYOUT, torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default}
Graphs = tuple[fx.GraphModule, fx.GraphModule]


@contextmanager
def partitioning(partition: Partition) -> Iterator[None]:
    """Let Inductor partition by ``partition``, and save nothing that is cheap to recompute.

    On the kept rows nearly everything is cheap.
    """
    cheap = torch._functorch.config.patch(aggressive_recomputation=True)
    with cheap, torch._inductor.config.patch(custom_partitioner_fn=partition):
        yield


class Partition(CustomPartitionerFn):
    """Cut a joint graph into forward and backward.

    Args:
        recompute: backward recomputes the forward; only the inputs of the segment are saved.
        kv: the keys/values mode.
        places: positions of keys and values among the inputs.
    """

    def __init__(self, recompute: bool = False, kv: KVMode = KEEP, places: tuple[int, ...] = ()) -> None:
        self.recompute, self.kv, self.places = recompute, kv, places

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> Graphs:
        save_random(gm.graph)
        recompute_kv(gm.graph)
        if self.recompute:
            recompute_forward(gm.graph)
        elif not self.kv.is_exact:
            recompute_attention(gm.graph, self.places)
        with without_generator_states():
            graphs = partitioners.min_cut_rematerialization_partition(gm, joint_inputs, **options)
        kv_storage.store_kv(self.kv, self.places, *graphs, options["num_fwd_outputs"])
        return graphs

    def uuid(self) -> Any:
        """The key of this partition in AOTAutograd's cache."""
        files = {__file__, kv_storage.__file__, *_source_files(self.kv)}
        return get_hash_for_files(tuple(sorted(files))), self.recompute, self.kv.name, self.places


def _source_files(mode: KVMode) -> Iterator[str]:
    for function in (mode.store, mode.restore):
        if function is not None and (file := inspect.getsourcefile(function)):
            yield file


def partition_of(
    segment: fx.GraphModule, taken: Sequence[Any], recompute: bool = False, kv: KVMode = KEEP
) -> Partition:
    """The partition of a segment with these inputs."""
    return Partition(recompute, kv, kv_storage.kv_inputs(segment, taken))


def save_random(graph: fx.Graph) -> None:
    """Mark random operations to be saved: recomputed dropout would differ from that of the forward."""
    for node in graph.nodes:
        if is_random(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def recompute_forward(graph: fx.Graph) -> None:
    """Mark the operations of the forward to be recomputed in backward."""
    recomputed: set[fx.Node] = set()
    for node in graph.nodes:
        if _can_repeat(node, recomputed):
            recomputed.add(node)
    _mark(recomputed)


def recompute_attention(graph: fx.Graph, places: Sequence[int]) -> None:
    """Mark the operations that read the keys and values at these positions of the inputs."""
    inputs = graph.find_nodes(op="placeholder")
    context, readers = {inputs[place] for place in places}, set[fx.Node]()
    for node in graph.nodes:
        if partitioners._has_tag_is_forward(node) and not {*node.all_input_nodes}.isdisjoint(context):
            (context if node.target in LAYOUT else readers).add(node)
        elif node.target is operator.getitem and node.args[0] in readers:
            readers.add(node)
    _mark(readers | context - {*inputs})


def recompute_kv(graph: fx.Graph) -> None:
    """Mark the operations that recompute keys and values, and those that only cast or lay out the result."""
    made: set[fx.Node] = set()
    for node in graph.nodes:
        if not partitioners._has_tag_is_forward(node) or node.op == "placeholder":
            continue
        follows = node.target in _FOLLOWS and {*node.all_input_nodes} <= made
        if follows or mark_of(node) == Mark.RECOMPUTED:
            made.add(node)
    _mark(made)


def _mark(nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta["ac_graph_id"] = 0


def _can_repeat(node: fx.Node, recomputed: set[fx.Node]) -> bool:
    """True if a node of the forward is computed from inputs or from recomputed values.

    Values computed from constants and from values that all blocks share (masks) are shared by all blocks. The fused
    head saves one number per row for its backward, and has no other use there.
    """
    if (
        not partitioners._has_tag_is_forward(node)
        or is_random(node)
        or node.target is torch.ops.tokenseek_fx.head_loss.default
    ):
        return False
    if node.target is operator.getitem:
        return node.args[0] in recomputed
    return any(arg in recomputed or arg.op == "placeholder" for arg in node.all_input_nodes)


@contextmanager
def without_generator_states() -> Iterator[None]:
    """Don't save states of the random generator.

    The partitioner would save one for every attention that is recomputed, random or not; random ones are never
    recomputed here.
    """
    before = partitioners.has_recomputable_rng_ops
    partitioners.has_recomputable_rng_ops = lambda module: False
    try:
        yield
    finally:
        partitioners.has_recomputable_rng_ops = before
