"""Custom autograd functions: opaque operations whose axes follow from the rules of the operations in their two bodies.

A result dim is carried if every operation of the forward body carries it, and every operation of the backward body
returns the rows of the gradient to the same rows of the operands. Otherwise the function is a barrier: rows are mixed
in either body, an operand without rows receives a gradient (how it is summed over tokens is the function's own choice),
or a body reads the number of tokens or has it as a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..capture.canonicalize import Canonicalize
from ..capture.retrace import CUSTOM_FUNCTION, fresh_like
from ..graph.errors import GraphNotSupported
from ..graph.factors import Axes, Space
from ..graph.nodes import is_tensor, operands_of, tensors_in
from ..graph.program import Program, attribute
from .axes import flow_of
from .op import Carry, Flow, Op, axes_rule

#: The row dim of each value that has rows.
RowDims = dict[fx.Node, int]


@dataclass(frozen=True)
class Body:
    """One of the two graphs of a custom function, functional, with the axes of its values."""

    inputs: list[fx.Node]
    outputs: list[Any]
    axes: dict[fx.Node, tuple[Axes, ...]]
    flows: dict[fx.Node, Flow]

    def carried(self, dims: RowDims) -> RowDims | None:
        """The row dims of all values, given those of some inputs.

        ``None`` if rows are mixed, or their number is read.
        """
        dims = dict(dims)
        for node in self.flows:
            if any(arg in dims for arg in node.all_input_nodes):
                dim = dims[node.args[0]] if node.target is operator.getitem else self._dim_of(node, dims)
                if dim is None:
                    return None
                dims[node] = dim
        return dims

    def _dim_of(self, node: fx.Node, dims: RowDims) -> int | None:
        """The result dim to which exactly the operands with rows carry them; ``None`` if there is none."""
        flow, rows = self.flows[node], [dims.get(operand) for operand in operands_of(node)]
        if not tensors_in(node.meta["val"]) or len(flow.carries) != len(rows):
            return None
        return next((to for to in range(len(flow.outputs[0])) if [c.get(to) for c in flow.carries] == rows), None)


@axes_rule(CUSTOM_FUNCTION)
def custom_function(op: Op) -> Flow:
    """The results have the axes of the outputs of the forward body."""
    forward_graph, backward_graph, *args = op.node.args
    forward = _body(op, forward_graph, args, op._axes)
    count = len(pytree.tree_leaves(op.node.meta["val"]))
    if forward is None or count != len(op.results) or not all(map(is_tensor, forward.outputs[:count])):
        return op.unknown()
    outputs = tuple(forward.axes[node][0] for node in forward.outputs[:count])
    carries: list[Carry] = [{} for _ in op.operands]
    fixed = any(_reads_sizes(_module(op, graph).graph) for graph in (forward_graph, backward_graph))
    backward = None if fixed else _backward(op, backward_graph, forward)
    for to, dims in _row_dims(op.space, forward, outputs) if backward is not None else ():
        if _returns_rows(forward, backward, count, to, dims):
            for carry, operand in zip(carries, filter(is_tensor, forward.inputs), strict=True):
                carry.update({to: dims[operand]} if operand in dims else {})
    return Flow(outputs, tuple(carries))


def _body(op: Op, graph: fx.Node, args: Sequence[Any], known: Mapping[fx.Node, tuple[Axes, ...]]) -> Body | None:
    """A body traced on ``args`` (nodes or numbers); ``None`` if it can't be traced, or writes to its inputs."""
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    axes = [known.get(arg, ((),)) if isinstance(arg, fx.Node) else ((),) for arg in args]
    step, inputs = Canonicalize(), tuple(fresh_like(value, op.results) for value in values)  # inputs must be distinct
    try:
        program = step.run(Program(_module(op, graph), inputs))
        step.check(program)
    except GraphNotSupported:
        return None
    found, flows = dict(zip(program.placeholders, axes, strict=True)), {}
    for node in program.graph.nodes:
        if node not in found and node.op != "output":
            flows[node] = flow_of(node, op.space, found)
            found[node] = flows[node].outputs
    return None if program.mutated else Body(program.placeholders, program.outputs, found, flows)


def _module(op: Op, graph: fx.Node) -> fx.GraphModule:
    return attribute(op.node.graph.owning_module, graph.target)


def _reads_sizes(graph: fx.Graph) -> bool:
    """True if something is computed from a dynamic size, which would differ on the kept rows."""
    unused: set[fx.Node] = set()
    for node in (node for node in reversed(graph.nodes) if node.op.startswith("call")):
        values = pytree.tree_leaves(node.meta.get("example_value"))
        if all(user in unused for user in node.users) and not tensors_in(values):
            unused.add(node)
        elif any(isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) for value in values):
            return True
    return False


def _backward(op: Op, graph: fx.Node, forward: Body) -> Body | None:
    """The backward body; its inputs are the gradients of the results and the values that the forward saved."""
    return _body(op, graph, forward.outputs, forward.axes)


def _row_dims(space: Space, forward: Body, outputs: Sequence[Axes]) -> Iterator[tuple[int, RowDims]]:
    """For every dim of the first result, the row dims that it implies.

    Those are the row dims of the operands and of all values of the forward body.
    """
    for to, label in enumerate(map(space.resolve, outputs[0])):
        at = {node: [space.resolve(dim) for dim in forward.axes[node][0]] for node in forward.inputs}
        found = forward.carried({node: labels.index(label) for node, labels in at.items() if label and label in labels})
        if found and all(found.get(node) == to for node in forward.outputs[: len(outputs)]):
            yield to, found


def _returns_rows(forward: Body, backward: Body, count: int, to: int, dims: RowDims) -> bool:
    """True if every gradient of an operand has the rows of that operand."""
    gradients = dict.fromkeys(backward.inputs[:count], to)
    saved = {
        new: dims[old]
        for new, old in zip(backward.inputs[count:], forward.outputs[count:], strict=True)
        if isinstance(old, fx.Node) and old in dims
    }
    found = backward.carried({**gradients, **saved})
    pairs = zip(forward.inputs, backward.outputs, strict=True)
    return found is not None and all(
        gradient is None or (operand in dims and found.get(gradient) == dims[operand]) for operand, gradient in pairs
    )
