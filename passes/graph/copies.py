"""Copies of graphs: a pass changes a copy, never the graph that it receives."""

from __future__ import annotations

from torch import fx


def copied(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Copy the graph of a module; parameters and submodules are shared.

    Returns:
        The module with the copy, and the copy of every node.
    """
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
    return fx.GraphModule(module, graph), nodes
