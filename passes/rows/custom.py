"""Row rule of custom autograd functions: the same two bodies on the kept rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from ..capture.retrace import CUSTOM_FUNCTION, fresh_like, record_opaque
from ..graph.fake import fake_mode_of
from .row_op import RowOp
from .rules import restricts, rows_rule


@rows_rule(CUSTOM_FUNCTION)
def custom_function_on_rows(call: RowOp) -> Any:
    """Record the same two bodies on the kept rows, if the forward body runs on them."""
    if not restricts(call):
        return NotImplemented
    example = _run_fake(call)
    shapes = [call.row_index.row_shape(x.shape, call.dim) for x in call.streams.seek[call.node]]
    if example is None or [list(x.shape) for x in example] != shapes:
        return NotImplemented
    bodies, operands = call.args[:2], call.args[2:]
    return record_opaque(call.target, (*map(_tagged, bodies), *operands), call.kwargs, example)


def _tagged(body: fx.GraphModule) -> fx.GraphModule:
    """A copy whose operations carry the kind of value that is being traced, for the audit of saved tensors."""
    graph, kind = copy.deepcopy(body.graph), fx_traceback.current_meta.get("custom", {})
    for node in graph.nodes:
        node.meta["custom"] = {**node.meta.get("custom", {}), **kind}
    return fx.GraphModule(body, graph)


def _run_fake(call: RowOp) -> Sequence[torch.Tensor] | None:
    """The results on the kept rows as fake tensors; ``None`` if the body was traced for the shapes of all tokens."""
    body, _, *args = call.args
    with disable_proxy_modes_tracing(), fake_mode_of(args), torch.no_grad():
        try:
            return body(*(fresh_like(arg, args) for arg in args))[0]
        except (RuntimeError, ValueError):
            return None
