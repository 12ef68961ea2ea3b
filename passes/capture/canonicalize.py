"""Canonicalize: retrace Dynamo's graph as a functional pre-dispatch ATen graph, without loss.

In this graph ``linear``, ``scaled_dot_product_attention``, norms and losses are single operations, and autograd has not
run yet. A naive retrace would be silently wrong in several ways, which are handled here:

- Custom autograd functions and other higher-order operators stay one opaque node, which keeps their backward.
- Writes become functional values, writes to inputs extra outputs; written inputs that share memory are refused.
- A write that autograd does not see (under ``no_grad``, through ``detach``) is refused, see ``writes``.
- A tensor constant other than a small literal means that the trace lost a dependence: refused.
- Autocast regions are entered for real, so that dtypes are right, and kept as nodes.
- Activation checkpointing is inlined; values and gradients are the same.
- ``torch.no_grad`` and ``torch.inference_mode`` regions become explicit ``detach`` nodes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..graph.emit import emit
from ..graph.errors import GraphNotSupported, InvariantBroken
from ..graph.factors import same_size
from ..graph.fake import fake_inputs, fake_mode_of
from ..graph.nodes import is_random
from ..graph.program import Program, attribute
from ..graph.symbolic_sizes import Numbers
from .retrace import ENTER_AUTOCAST, EXIT_AUTOCAST, Retrace, is_autocast, unwrap
from .writes import refuse_aliases

aten = torch.ops.aten
_LARGEST_LITERAL = 64
#: What to use instead of a tensor subclass.
_REMEDIES = {"DTensor": "Shard the model by fully_shard(model), which gathers plain parameters before the forward."}
_ASSERTS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "_functional_assert_async",
}


@dataclass(frozen=True)
class Canonicalize:
    """Retrace the graph as a functional pre-dispatch ATen graph.

    Reads ``module`` and ``inputs``; writes both and ``mutated``. Raises ``GraphNotSupported`` if the trace isn't exact.
    """

    name: str = "canonicalize"

    def run(self, program: Program) -> Program:
        _refuse_function_transforms(program.module)
        _refuse_wrapped_tensors(program)
        fakes = fake_inputs(program.module, program.inputs)
        writes: list[int] = []
        with warnings.catch_warnings(), fx_traceback.preserve_node_meta(), fake_mode_of(fakes):
            warnings.filterwarnings("ignore", message=".*pre-dispatch.*")
            module = _traced(_functional(program.module, writes), fakes)
        refuse_aliases(program, writes)
        _tidy(module, Numbers(module.graph, fakes))
        return replace(program, module=module, inputs=fakes, mutated=tuple(writes))

    def check(self, program: Program) -> None:
        """The graph is well-formed and functional, and every tensor constant is a small literal."""
        program.graph.lint()
        for node in program.graph.nodes:
            _check_functional(node)
            if node.op == "get_attr":
                _check_constant(program.module, node)


def _functional(module: fx.GraphModule, writes: list[int]) -> Any:
    """``module`` as a function without writes; appends the positions of the inputs that it writes to ``writes``."""

    def run(*args: Any) -> tuple:
        outside = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with outside, FunctionalTensorMode(pre_dispatch=True, export=True):
            wrapped = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, args)
            outputs = pytree.tree_map_only(FunctionalTensor, unwrap, Retrace(module).run(*wrapped))
            updates = {i: unwrap(x) for i, x in enumerate(wrapped) if isinstance(x, FunctionalTensor)}
        changed = {i: new for i, new in updates.items() if new is not args[i]}
        writes[:] = changed
        flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return (*pytree.tree_leaves(flat, is_leaf=lambda x: x is None), *changed.values())

    return run


def _refuse_function_transforms(module: fx.GraphModule) -> None:
    """Refuse ``torch.func`` transforms (vmap, grad), whose wrapped values functionalization can't trace."""
    for node in module.graph.nodes:
        if node.op == "call_function" and (getattr(node.target, "__module__", None) or "").startswith(
            "torch._functorch"
        ):
            raise GraphNotSupported(
                "The model uses a torch.func transform (vmap or grad) in its forward.",
                "Write it with batched operations.",
                node,
            )


def _refuse_wrapped_tensors(program: Program) -> None:
    """Refuse tensor subclasses made of other tensors (a quantised weight of torchao, a DTensor)."""
    for node, value in zip(program.placeholders, program.inputs, strict=True):
        if is_traceable_wrapper_subclass(value):
            raise GraphNotSupported(
                f"The input {node.name} is a {type(value).__name__}, a tensor made of other tensors, which can't be "
                "traced to ATen yet.",
                _REMEDIES.get(type(value).__name__, "For a quantised base model, use bitsandbytes (4 or 8 bits)."),
                node,
            )


def _traced(function: Any, inputs: tuple) -> fx.GraphModule:
    try:
        return make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs)
    except GraphNotSupported:
        raise
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        refused = GraphNotSupported(f"The graph can't be traced to ATen ({type(error).__name__}: {first_line}).")
        refused.__dict__.update(error.__dict__)  # its place
        raise refused from error


def _tidy(module: fx.GraphModule, number: Numbers) -> None:
    """Remove operations without effect (asserts, aliases, slices of everything, idle dropout and autocast).

    Expand ``copy``; writes to everything are what is written.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        name = node.target._schema.name.removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""
        if name in _ASSERTS:
            module.graph.erase_node(node)
        elif name == "alias" or (name == "slice" and _is_whole(node)) or (name == "dropout" and not is_random(node)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif name == "slice_scatter" and all(map(same_size, node.args[1].meta["val"].shape, node.meta["val"].shape)):
            node.replace_all_uses_with(node.args[1])
            module.graph.erase_node(node)
        elif name == "cat" and len(rest := _not_empty(node)) == 1:
            node.replace_all_uses_with(rest[0])
            module.graph.erase_node(node)
        elif name == "copy":
            _expand_copy(node, number)
        elif node.target is EXIT_AUTOCAST:
            _drop_idle_autocast(module.graph, node)
    module.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_autocast(node))
    module.recompile()


def _not_empty(node: fx.Node) -> list[fx.Node]:
    """The operands of a concatenation without empty tensors, for which Inductor's layout differs from the trace's."""
    dtype, joined = node.meta["val"].dtype, list[Any](node.args[0])  # type: ignore[call-overload]
    rest = [x for x in joined if not any(isinstance(size, int) and size == 0 for size in x.meta["val"].shape)]
    return rest if all(x.meta["val"].dtype is dtype for x in rest) else joined


def _is_whole(node: fx.Node) -> bool:
    """True if a slice takes all of its operand; with symbolic sizes, indexing leaves such slices."""
    value, whole = node.meta["val"], node.args[0].meta["val"]
    return all(map(same_size, value.shape, whole.shape))


def _expand_copy(node: fx.Node, number: Numbers) -> None:
    """Replace ``aten.copy``, which has no derivative, by ``src.to(dtype).expand(shape)``."""
    target, source = (arg.meta["val"] for arg in node.args[:2])
    with node.graph.inserting_before(node):
        cast = emit(node, aten._to_copy.default, node.args[1], dtype=target.dtype)
        wider = source.shape != target.shape
        same = number.emit(node, aten.expand.default, cast, list(target.shape)) if wider else cast
    node.replace_all_uses_with(same)
    node.graph.erase_node(node)


def _drop_idle_autocast(graph: fx.Graph, leave: fx.Node) -> None:
    """Remove an autocast region that is empty, or that switches autocast off where it is off already."""
    enter = leave.args[0]
    device, _, enabled, *_ = (*enter.args, None, None, None)
    outer = torch.is_autocast_enabled(device) or any(
        node.target is ENTER_AUTOCAST and node.args[0] == device and node.args[2] for node in graph.nodes
    )
    if enter.next is leave or (not enabled and not outer):
        graph.erase_node(leave)
        graph.erase_node(enter)


def _check_functional(node: fx.Node) -> None:
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.users:
        raise GraphNotSupported(
            f"The operation {node.target} writes to its operands and could not be made functional.",
            "Use its out-of-place form in the model.",
            node,
        )
    if node.op == "call_module":
        raise InvariantBroken(f"The canonical graph calls a module: {node.format_node()}")


def _check_constant(module: fx.GraphModule, node: fx.Node) -> None:
    value = pytree.tree_leaves(attribute(module, str(node.target)))[0]
    if isinstance(value, torch.nn.Parameter) or not isinstance(value, torch.Tensor):
        return
    if value.requires_grad or value.numel() > _LARGEST_LITERAL:
        raise GraphNotSupported(
            f"The trace turned a tensor of shape {tuple(value.shape)} into a constant, so its gradient or its "
            "dependence on the inputs would be lost.",
            "Make it a buffer or an input of the model; replace vmap by batched operations.",
            node,
        )
