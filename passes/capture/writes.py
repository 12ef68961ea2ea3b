"""Writes: what a model's forward writes to, and which writes have no functional form.

Autograd does not see a write under ``torch.no_grad``, through ``detach()`` or ``.data``: the value changes, and its
gradient stays that of the old value. A functional form of such a write would be differentiated, or would cut the
gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph.errors import GraphNotSupported
from ..graph.program import Program
from ..graph.strides import memory_of

_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift,
}  # fmt: skip
#: Named like writes, but they change no value.
_HARMLESS = {"requires_grad_", "detach_"}


def written_by(node: fx.Node) -> fx.Node | None:
    """The node that an operation of Dynamo's graph writes to; ``None`` if it writes nothing."""
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.kwargs.get("out"), fx.Node):
        return node.kwargs["out"]  # type: ignore[return-value]
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    schema = getattr(node.target, "_schema", None)
    writes = named or node.target in _IN_PLACE or node.kwargs.get("inplace") is True
    target = node.args[0] if node.args and (writes or (schema and schema.is_mutable)) else None
    return target if isinstance(target, fx.Node) else None


def refuse_hidden_write(node: fx.Node, grad_enabled: bool, live: set[int]) -> None:
    """Refuse a write that autograd does not see to a value that carries gradient.

    Dynamo's example values tell what requires grad and what shares memory; a graph without them is assumed to have no
    such write.

    Args:
        node: the operation to check.
        grad_enabled: whether grad mode is enabled at the node.
        live: the memory of values that carry gradient before the node; that of its results is added.

    Raises:
        GraphNotSupported: the node is such a write.
    """
    target = written_by(node)
    value = None if target is None else target.meta.get("example_value")
    if isinstance(value, Tensor) and not (grad_enabled and value.requires_grad) and memory_of(value) in live:
        raise GraphNotSupported(
            "The forward writes to a value that carries gradient where autograd does not see it (under no_grad, or "
            "through detach() or .data).",
            "Compute the new value out of place: torch.where, or x + (new - x).detach() to keep the gradient of x.",
            node,
        )
    if node.op != "placeholder":  # a write to a parameter is refused later, by its update
        values = pytree.tree_leaves(node.meta.get("example_value"))
        live.update(memory_of(x) for x in values if isinstance(x, Tensor) and x.requires_grad)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have the same entries in memory: to write one to the other changes nothing.

    bitsandbytes sets the data of an 8-bit weight to the buffer that it has already.
    """
    places = [(memory_of(x), x.shape, x.stride(), x.storage_offset()) for x in (a, b)]
    return a is b or places[0] == places[1]


def refuse_aliases(program: Program, writes: Sequence[int]) -> None:
    """Refuse a write to an input that shares memory with another input.

    Raises:
        GraphNotSupported: there is such a write.
    """
    memory = {i: memory_of(x) for i, x in enumerate(program.inputs) if isinstance(x, Tensor)}
    for i in writes:
        if sum(place == memory[i] for place in memory.values()) > 1:
            raise GraphNotSupported(
                "The forward writes to a buffer that shares its memory with another one.",
                "Keep one of them and compute the other from it in the forward.",
                program.placeholders[i],
            )
