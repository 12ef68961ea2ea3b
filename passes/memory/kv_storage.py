"""Storage of keys and values: save what the keys/values mode stores, in the partitioned graphs of a segment.

Keys and values are inputs of the segments (``Mark.KEYS_VALUES``). The nodes of ``KVMode.store`` are added to the
forward graph, those of ``KVMode.restore`` to the backward graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..graph.kinds import Mark, mark_of
from ..graph.nodes import is_tensor
from ..keep.kv_modes import KVMode


def kv_inputs(segment: fx.GraphModule, taken: Sequence[Any]) -> tuple[int, ...]:
    """The positions of keys and values among the inputs of a segment.

    As in AOTAutograd, a tensor that is passed twice counts once.
    """
    nodes: dict[Any, fx.Node] = {}
    for node, value in zip(segment.graph.find_nodes(op="placeholder"), taken, strict=True):
        nodes.setdefault(id(value) if isinstance(value, torch.Tensor) else node, node)
    return tuple(i for i, node in enumerate(nodes.values()) if _is_kv(node))


def store_kv(
    mode: KVMode, places: Sequence[int], forward: fx.GraphModule, backward: fx.GraphModule, outputs: int
) -> None:
    """Save the inputs of ``forward`` at ``places`` as ``mode`` does.

    Args:
        mode: the keys/values mode.
        places: positions of keys and values among the inputs of ``forward``.
        forward: the forward graph; changed in place.
        backward: the backward graph; changed in place.
        outputs: the number of outputs of ``forward`` before the saved values.
    """
    if mode.store is None or mode.restore is None:
        return
    inputs = forward.graph.find_nodes(op="placeholder")
    returned: Any = forward.graph.output_node().args[0]
    saved = returned[outputs:]
    for node in (inputs[place] for place in places if inputs[place] in saved):
        with forward.graph.inserting_before(_first_operation(forward)):
            stored = mode.store(node)
        read, old = _save_instead(forward, backward, node, stored, outputs)
        with backward.graph.inserting_before(_first_operation(backward)):
            old.replace_all_uses_with(mode.restore(old, read))
        backward.graph.erase_node(old)
    forward.recompile()
    backward.recompile()


def _is_kv(node: fx.Node) -> bool:
    return mark_of(node) == Mark.KEYS_VALUES and is_tensor(node) and node.meta["val"].is_floating_point()


def _first_operation(module: fx.GraphModule) -> fx.Node:
    return next(node for node in module.graph.nodes if node.op != "placeholder")


def _save_instead(
    forward: fx.GraphModule, backward: fx.GraphModule, node: fx.Node, stored: Sequence[fx.Node], outputs: int
) -> tuple[list[fx.Node], fx.Node]:
    """Save ``stored`` in place of ``node``.

    Returns:
        The new inputs of ``backward``, and its input for ``node``, which is no longer passed.
    """
    output, old = forward.graph.output_node(), next(n for n in backward.graph.nodes if n.name == node.name)
    returned: Any = output.args[0]
    saved = (x for out in returned[outputs:] for x in (stored if out is node else (out,)))
    output.args = ((*returned[:outputs], *saved),)
    with backward.graph.inserting_before(old):
        read = [backward.graph.placeholder(x.name) for x in stored]
    for new, x in zip(read, stored, strict=True):
        new.meta = dict(x.meta)
    return read, old
