"""What passes hand to each other: a graph and what is known about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from .activity import Activity
    from .attend import Attending
    from .audit import Audit
    from .blocks import Blocks
    from .ditch import Rewrite
    from .split import Segments
    from .token_axes import TokenAxes


@dataclass(frozen=True)
class Program:
    """A traced forward and the results of the passes that ran on it (``None``: the pass has not run).

    ``module``: after ``canonicalize`` a functional pre-dispatch ATen graph whose nodes carry fake tensors in
    ``meta["val"]``. ``inputs``: its example inputs (real, fake, or numbers). ``mutated``: positions of the inputs that
    the forward writes to; their new values are the last ``len(mutated)`` outputs of the canonical graph.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    mutated: tuple[int, ...] = ()
    axes: TokenAxes | None = None
    activity: Activity | None = None
    blocks: Blocks | None = None
    attending: Mapping[fx.Node, Attending] = field(default_factory=dict)
    rewrite: Rewrite | None = None
    segments: Segments | None = None
    audit: Audit | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def outputs(self) -> list[Any]:
        """The values that the model returns (without updates of mutated inputs), flat; may hold ``None`` and numbers."""
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
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"^(L\['\w+'\]|self)\.?", "", path)


def source_line(node: fx.Node) -> str:
    """``(file:line)`` of the innermost frame outside of torch (inside, where there is no other)."""
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
