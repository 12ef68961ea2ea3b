"""Copies of graphs: a pass changes a copy, never the graph that it was given."""

from __future__ import annotations

from torch import fx


def copied(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A module with a copy of the graph, and the node of the copy for every node. Parameters and submodules are shared."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
    return fx.GraphModule(module, graph), nodes
