"""Un-aliased outputs: results of a subgraph do not share memory.

A compiler that sees only the call treats every result as memory of its own. Inductor reused the memory of one result
while a view of it was still read, and counts the offset twice for a result that is a part of a larger value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from ...ops.copied import copied
from ..graph.copies import copied as copied_graph
from ..graph.emit import emit
from ..graph.nodes import hint, is_tensor
from ..graph.program import Program
from ..graph.strides import memory_of
from ..streams.trace import Rewrite


@dataclass(frozen=True)
class UnaliasOutputs:
    """Copy results of subgraphs that share memory.

    Reads and writes ``Rewrite``. The subgraphs are those that chunked prefill calls.
    """

    name: str = "un-aliased outputs"

    def run(self, program: Program) -> Program:
        rewrite = program[Rewrite].copied()
        calls = rewrite.module.graph.find_nodes(op="call_function", target=invoke_subgraph)
        for name in dict.fromkeys(call.args[0].target for call in calls):  # chunks and identical layers share a body
            body, _ = copied_graph(getattr(rewrite.module, name))
            unalias_outputs(body.graph)
            body.recompile()
            setattr(rewrite.module, name, body)
        return program.with_(rewrite)

    def check(self, program: Program) -> None:
        """The graph is well-formed."""
        program[Rewrite].module.graph.lint()


def unalias_outputs(graph: fx.Graph) -> None:
    """Copy every output that is, or may become, a part of a larger value, or a view of an input or another output.

    An example are queries, keys and values from one matrix product.
    """
    output, constants = graph.output_node(), _constants(graph)
    taken = {memory_of(x.meta["val"]) for x in graph.find_nodes(op="placeholder") if is_tensor(x)}
    results = list[fx.Node]()
    given: Any = output.args[0]
    with graph.inserting_before(output):
        for node in given:
            memory = memory_of(node.meta["val"])
            is_own = memory not in taken and not any(map(_is_part, _may_become(node, constants)))
            taken.add(memory)
            results.append(node if is_own else emit(node, copied, node))
    output.args = (tuple(results),)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no input of ``graph``."""
    found = set[fx.Node]()
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr") and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _may_become(node: fx.Node, constants: set[fx.Node]) -> Iterator[fx.Node]:
    """``node``, and the values that may replace it if a compiler drops operations without effect.

    Those are copies and products with ones.
    """
    read, sizes = [node], _sizes(node)
    while len(read) == 1 and _sizes(read[0]) == sizes:
        yield read[0]
        read = [x for x in read[0].all_input_nodes if is_tensor(x) and x not in constants]


def _sizes(node: fx.Node) -> list[int]:
    return [hint(size) for size in node.meta["val"].shape]


def _is_part(node: fx.Node) -> bool:
    value = node.meta["val"]
    return node.op == "call_function" and hint(value.untyped_storage().nbytes()) > hint(value.numel()) * value.itemsize
