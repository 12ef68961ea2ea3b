"""Program: a traced graph and the results of the passes that ran on it, by type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import fx
from torch.utils import _pytree as pytree

Result = TypeVar("Result")


@dataclass(frozen=True)
class Program:
    """A traced forward and the results of the passes that ran on it.

    Args:
        module: after ``canonicalize`` a functional pre-dispatch ATen graph whose nodes have fake tensors in
            ``meta["val"]``.
        inputs: example inputs (real or fake tensors, numbers).
        mutated: positions of the inputs that the forward mutates. Their new values are the last ``len(mutated)``
            outputs.
        results: the result of each pass by its type; a type is defined in the file of the pass that writes it.
        done: names of the passes that ran, in order.

    >>> program[TokenAxes].tokens  # doctest: +SKIP
    >>> program = program.with_(TokenAxes(...))  # doctest: +SKIP
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    mutated: tuple[int, ...] = ()
    results: Mapping[type, Any] = field(default_factory=dict)
    done: tuple[str, ...] = ()

    def __getitem__(self, kind: type[Result]) -> Result:
        """The result of this type.

        Raises:
            KeyError: the pass that writes it has not run.
        """
        if kind not in self.results:
            raise KeyError(
                f"No pass has written {kind.__name__} yet; passes that ran: {', '.join(self.done) or 'none'}."
            )
        return self.results[kind]

    def get(self, kind: type[Result]) -> Result | None:
        """The result of this type; ``None`` if the pass that writes it has not run."""
        return self.results.get(kind)

    def with_(self, *results: Any) -> Program:
        """A copy of the program with these results; each replaces one of the same type."""
        return replace(self, results={**self.results, **{type(result): result for result in results}})

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs of the model, without updates of mutated inputs; may contain ``None`` and numbers."""
        flat = self._all_outputs
        return flat[: len(flat) - len(self.mutated)]

    @property
    def updates(self) -> list[Any]:
        """New values of the mutated inputs, in the order of ``mutated``."""
        flat = self._all_outputs
        return flat[len(flat) - len(self.mutated) :]

    @property
    def _all_outputs(self) -> list[Any]:
        return pytree.tree_leaves(self.graph.output_node().args[0], is_leaf=lambda x: x is None)


def where(node: fx.Node) -> str:
    """The module path and the user's source line of a node, for messages: ``model.layers.0.mlp (modeling.py:12)``."""
    return " ".join(part for part in (module_path(node), source_line(node)) if part) or f"node {node.name}"


def module_path(node: fx.Node) -> str:
    """The path of the module that called a node's operation."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"^(L\['\w+'\]|self)\.?", "", path)


def source_line(node: fx.Node) -> str:
    """``(file:line)`` of the innermost stack frame outside torch; inside torch if there is no other."""
    trace = (node.meta.get("stack_trace") or "").splitlines()
    frames = [line.strip().split('"', 2) for line in trace if line.strip().startswith("File")]
    if not frames:
        return ""
    _, file, rest = next((frame for frame in reversed(frames) if "/torch/" not in frame[1]), frames[-1])
    return f"({file.rsplit('/', 1)[-1]}:{rest.split('line ')[1].split(',')[0]})"


def attribute(module: Any, path: str) -> Any:
    """``module.a.b`` for the path ``"a.b"``."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
