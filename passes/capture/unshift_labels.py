"""Unshift labels: rewrite a loss over a slice of the tokens as the same loss over all tokens.

``cross_entropy(logits[:, a:b], labels)`` equals ``cross_entropy(logits, padded labels)`` if positions outside the slice
are ignored. So the logits of a hand-written next-token loss keep the token axis, as in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graph.copies import copied
from ..graph.emit import emit
from ..graph.factors import same_size
from ..graph.nodes import bind
from ..graph.op_sets import CASTS, LABEL_LOSSES, VIEWS
from ..graph.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class UnshiftLabels:
    """Move a slice of the token axis from the logits of a loss to its labels.

    Reads and writes ``module``.
    """

    name: str = "unshift labels"

    def run(self, program: Program) -> Program:
        module, _ = copied(program.module)
        losses = [node for node in module.graph.nodes if node.target in LABEL_LOSSES]
        unshifted = [_unshift(node) for node in losses]
        if not any(unshifted):
            return program
        module.graph.eliminate_dead_code()
        module.recompile()
        return replace(program, module=module)

    def check(self, program: Program) -> None:
        program.graph.lint()


def _unshift(loss: fx.Node) -> bool:
    arguments = bind(loss)
    logits, target = arguments["self"], arguments["target"]
    chain, cut = _chain_to_slice(logits) if logits.meta["val"].ndim == 2 else ([], None)
    if cut is None or arguments["reduction"] == 0 or target.meta["val"].is_floating_point():
        return False
    whole, (start, missing) = cut.args[0], _range(cut)
    with loss.graph.inserting_before(loss):
        rows = emit(loss, aten.reshape.default, target, [-1, _size(loss, cut)])
        padded = emit(loss, aten.constant_pad_nd.default, rows, [start, missing], arguments["ignore_index"])
        labels = emit(loss, aten.reshape.default, padded, [-1])
        for step in reversed(chain):
            how = (-1, *step.args[2:]) if step.target is aten.slice.Tensor else step.args[1:]
            whole = emit(step, step.target, whole, *how, **step.kwargs)
        whole = emit(loss, aten.reshape.default, whole, [-1, logits.meta["val"].shape[-1]])
        loss.replace_input_with(logits, whole)
        loss.replace_input_with(target, labels)
    return True


def _chain_to_slice(node: Any) -> tuple[list[fx.Node], fx.Node | None]:
    """Follow the logits ``[B * T', C]`` of a loss back to a slice ``x[:, a:b]``.

    Returns:
        The copies, casts and slices of the classes on the way, and the slice; ``None`` if there is no such slice.
    """
    chain: list[fx.Node] = []
    classes = node.meta["val"].shape[-1]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in CASTS:
            chain.append(node)
        elif _is_class_slice(node):
            chain.append(node)
            classes = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        elif node.target is aten.slice.Tensor and not same_size(_rows(node), _rows(node.args[0])):
            return chain, node if _is_token_slice(node) else None
        elif node.target is not aten.slice.Tensor and not (
            node.target in VIEWS and same_size(node.meta["val"].shape[-1], classes)
        ):
            break
        node = node.args[0]
    return chain, None


def _is_class_slice(node: fx.Node) -> bool:
    """True for a slice of the last dim."""
    return node.target is aten.slice.Tensor and bind(node)["dim"] in (-1, node.meta["val"].ndim - 1)


def _rows(node: fx.Node) -> Any:
    shape = node.meta["val"].shape
    return shape[1] if len(shape) == 3 else shape[0]


def _is_token_slice(cut: fx.Node) -> bool:
    arguments = bind(cut)
    return cut.meta["val"].ndim == 3 and arguments["dim"] in (1, -2) and arguments["step"] == 1


def _range(cut: fx.Node) -> tuple[int, Any]:
    """The numbers of positions before and after the slice."""
    arguments = bind(cut)
    whole, part = cut.args[0].meta["val"].shape[1], cut.meta["val"].shape[1]
    start = arguments["start"] or 0
    start = start + whole if start < 0 else start
    return start, int(whole - part - start)


def _size(loss: fx.Node, cut: fx.Node) -> Any:
    """The length of the slice, as a number or a node."""
    size = cut.meta["val"].shape[1]
    return size if isinstance(size, int) else emit(loss, aten.sym_size.int, cut, 1)
