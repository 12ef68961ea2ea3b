"""Context: what is kept for backward of keys and values, which alone have all tokens.

The forward of a block uses them as they are. ``"fp8"``: backward sees copies of 8 bits for each element, with a scale for each
instance and head, and computes the attention again from them (``saving.repeat_attention``). ``"offload"``: they wait in pinned host memory. Both are put into the graphs that AOTAutograd cut, where keys
and values are inputs: of attentions that look at them by position (``attend.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .emit import emit
from .rules.op import is_tensor

aten = torch.ops.aten
_CONVERT, _MOVE = torch.ops.prims.convert_element_type.default, torch.ops.prims.device_put.default
FP8 = torch.float8_e4m3fn
#: Kinds of saved values: keys and values, and those that are not on the device.
CONTEXT, ON_HOST = "keys/values", "host"
_SMALLEST = 1e-30  # of magnitudes: a head that is 0 throughout has a scale too


def inputs_of(part: fx.GraphModule, taken: Sequence[Any]) -> tuple[int, ...]:
    """The places of keys and values among the inputs of a segment; a tensor that comes twice counts once, as for AOTAutograd."""
    nodes: dict[Any, fx.Node] = {}
    for node, value in zip(part.graph.find_nodes(op="placeholder"), taken, strict=True):
        nodes.setdefault(id(value) if isinstance(value, torch.Tensor) else node, node)
    return tuple(i for i, node in enumerate(nodes.values()) if _is_context(node))


def keep(kv: str, places: Sequence[int], forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> None:
    """Keep the inputs of ``forward`` at ``places`` as ``kv`` says; it has so many ``outputs`` of its own before what it saves."""
    make, restore = {"fp8": (_rounded, _as_it_was), "offload": (_on_host, _on_device)}[kv]
    inputs = forward.graph.find_nodes(op="placeholder")
    returned: Any = forward.graph.output_node().args[0]
    saved = returned[outputs:]
    for node in (inputs[place] for place in places if inputs[place] in saved):
        with forward.graph.inserting_before(_first_operation(forward)):
            stored = make(node)
        read, old = _save_instead(forward, backward, node, stored, outputs)
        with backward.graph.inserting_before(_first_operation(backward)):
            old.replace_all_uses_with(restore(old, *read))
        backward.graph.erase_node(old)
    forward.recompile()
    backward.recompile()


def _is_context(node: fx.Node) -> bool:
    kind = node.meta.get("custom", {}).get("tokenseek") if is_tensor(node) else None
    return kind == CONTEXT and node.meta["val"].is_floating_point()


def _first_operation(module: fx.GraphModule) -> fx.Node:
    return next(node for node in module.graph.nodes if node.op != "placeholder")


def _save_instead(
    forward: fx.GraphModule, backward: fx.GraphModule, node: fx.Node, stored: Sequence[fx.Node], outputs: int
) -> tuple[list[fx.Node], fx.Node]:
    """Save ``stored`` in place of ``node``. Returns the new inputs of ``backward``, and the one that nothing fills any more."""
    output, old = forward.graph.output_node(), next(n for n in backward.graph.nodes if n.name == node.name)
    returned: Any = output.args[0]
    saved = (x for out in returned[outputs:] for x in (stored if out is node else (out,)))
    output.args = ((*returned[:outputs], *saved),)
    with backward.graph.inserting_before(old):
        read = [backward.graph.placeholder(x.name) for x in stored]
    for new, x in zip(read, stored, strict=True):
        new.meta = dict(x.meta)
    return read, old


def _of_kind(kind: str, *nodes: fx.Node) -> tuple[fx.Node, ...]:
    for node in nodes:
        node.meta["custom"] = {"tokenseek": kind}
    return nodes


def _rounded(node: fx.Node) -> tuple[fx.Node, ...]:
    """A value in 8 bits, and its scale: the largest magnitude of the last two dims (of a head) over the largest of the format."""
    value = emit(node, _CONVERT, node, torch.float32)
    largest = emit(node, aten.amax.default, emit(node, aten.abs.default, value), [-2, -1], True)
    scale = emit(node, aten.div.Tensor, emit(node, aten.clamp_min.default, largest, _SMALLEST), torch.finfo(FP8).max)
    small = emit(node, _CONVERT, emit(node, aten.div.Tensor, value, scale), FP8)
    return _of_kind(CONTEXT, small, scale)


def _as_it_was(old: fx.Node, small: fx.Node, scale: fx.Node) -> fx.Node:
    value = emit(small, _CONVERT, small, torch.float32)
    value = emit(small, aten.mul.Tensor, value, scale)
    return emit(small, _CONVERT, value, old.meta["val"].dtype)


def _on_host(node: fx.Node) -> tuple[fx.Node, ...]:
    """Not waited for: all copies of a graph are in order on one stream. Inductor makes the target pinned memory."""
    return _of_kind(ON_HOST, emit(node, _MOVE, node, torch.device("cpu"), True))


def _on_device(old: fx.Node, stored: fx.Node) -> fx.Node:
    return emit(stored, _MOVE, stored, old.meta["val"].device, True)
