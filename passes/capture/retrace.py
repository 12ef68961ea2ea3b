"""Retrace: a graph run under ``make_fx``, recording what a plain retrace would lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.functional_tensor import FunctionalTensor, disable_functional_mode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils import _pytree as pytree

from ...compat import without_idle_results
from ..graph.errors import GraphNotSupported, located
from ..graph.fake import fake_mode_of
from .writes import refuse_hidden_write, same_memory, written_by

_SET_GRAD = torch._C._set_grad_enabled


_ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode


_EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode


ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


CUSTOM_FUNCTION = torch.ops.higher_order.autograd_function_apply


_INLINED = {"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"}


class Retrace(fx.Interpreter):
    """Run a graph under ``make_fx``, keeping what a plain retrace would lose (see the module's docstring)."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.grad_enabled = torch.is_grad_enabled()
        self._live = set[int]()
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        with located(n):
            return self._retrace(n)

    def _retrace(self, n: fx.Node) -> Any:
        refuse_hidden_write(n, self.grad_enabled, self._live)
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            with fx_traceback.set_current_meta(n):
                return self._after(self._higher_order(n, args, kwargs))
        return self._after(super().run_node(n)) if n.op.startswith("call") else super().run_node(n)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """A value written inside ``no_grad`` receives no gradient from its operands."""
        target = None if self.grad_enabled else written_by(n)
        if target is None:
            return super().map_nodes_to_values(args, n)
        return fx.map_arg(args, lambda arg: self.env[arg] if arg is target else _detached(self.env[arg]))

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is _SET_GRAD:
            self.grad_enabled = args[0]
            return None
        if target is _ENTER_INFERENCE:
            before, self.grad_enabled = self.grad_enabled, self.grad_enabled and not args[0]
            return before
        if target is _EXIT_INFERENCE:
            self.grad_enabled = args[0]
            return None
        if target in (ENTER_AUTOCAST, EXIT_AUTOCAST):
            return record_autocast(target, args, kwargs)
        if getattr(target, "__name__", "") == "_get_data_attr":  # x.data, which can't be traced
            return args[0].detach()
        if target is torch.Tensor.set_ and same_memory(*map(unwrap, args)):
            return args[0]
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        module = self.fetch_attr(target)
        return Retrace(module).run(*args) if isinstance(module, fx.GraphModule) else module(*args, **kwargs)

    def _after(self, value: Any) -> Any:
        return value if self.grad_enabled else pytree.tree_map(_detached, value)

    def _higher_order(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        if node.target.name() in _INLINED:
            body, *operands = args
            return Retrace(body).run(*operands)
        if any(map(_launches_triton, (node, *_nodes_in(args)))):
            raise GraphNotSupported(
                "The model launches its own Triton kernel; which tensors it reads and writes is unknown.",
                "Wrap it in an operation: torch.library.triton_op, or custom_op with a fake and a gradient.",
                node,
            )
        if node.target.name() == "register_hook":
            raise GraphNotSupported(
                "The forward registers a hook on a tensor (register_hook), which would see the gradient of the kept "
                "rows alone.",
                "Write it as a torch.autograd.Function whose forward returns x.view_as(x), and whose backward changes "
                "the gradient.",
                node,
            )
        example = node.meta.get("example_value", node.meta.get("val"))
        if node.target is CUSTOM_FUNCTION:
            forward, backward, count = without_idle_results(node, *args[:2])
            args, example = (forward, backward, *args[2:]), example[:count]
        return record_opaque(node.target, args, kwargs, example)


def _nodes_in(bodies: Iterable[Any]) -> Iterator[fx.Node]:
    """The nodes of the graphs among these arguments, and of the graphs that they call."""
    modules = (module for body in bodies if isinstance(body, torch.nn.Module) for module in body.modules())
    return (node for module in modules if isinstance(module, fx.GraphModule) for node in module.graph.nodes)


def _launches_triton(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name().startswith("triton_kernel_wrapper")


def _detached(value: Any) -> Any:
    can = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return value.detach() if can else value


def record_autocast(target: Any, args: tuple, kwargs: dict) -> Any:
    """Record an autocast switch and also execute it, so that values traced inside have the right dtypes."""
    mode = get_proxy_mode()
    if mode is None:
        return target(*args, **kwargs)
    proxies = tuple(getattr(arg, "_tokenseek_proxy", arg) for arg in args)
    proxy = mode.tracer.create_proxy("call_function", target, proxies, kwargs)
    with torch._C.DisableTorchFunction():
        switch = target(*args, **kwargs)
    if switch is not None:
        switch._tokenseek_proxy = proxy
    return switch


def record_opaque(target: Any, args: tuple, kwargs: dict, example: Any) -> Any:
    """Record a call as one node without tracing into it; ``example`` has the shapes of its results."""
    mode = get_proxy_mode()
    if mode is None:
        return target(*args, **kwargs)
    plain_args, plain_kwargs = pytree.tree_map_only(FunctionalTensor, unwrap, (args, kwargs))
    for body in (arg for arg in args if isinstance(arg, torch.nn.Module)):
        if not any(body is known for known in mode.tracer.root.modules()):
            mode.tracer.root.register_module(mode.tracer.get_fresh_qualname("body_"), body)
    proxy_args, proxy_kwargs = pytree.tree_map(mode.tracer.unwrap_proxy, (plain_args, plain_kwargs))
    proxy = mode.tracer.create_proxy("call_function", target, proxy_args, proxy_kwargs)
    result = track_tensor_tree(fresh_like(example, plain_args), proxy, constant=None, tracer=mode.tracer)
    if any(isinstance(leaf, FunctionalTensor) for leaf in pytree.tree_leaves((args, kwargs))):
        result = pytree.tree_map_only(torch.Tensor, FunctionalTensor.to_functional, result)
    return result


def fresh_like(example: Any, args: Any) -> Any:
    """New fake tensors with the shapes of ``example``, in the fake mode of ``args``."""
    with disable_functional_mode(), disable_proxy_modes_tracing(), fake_mode_of(args):
        return pytree.tree_map_only(
            torch.Tensor,
            lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device),
            example,
        )


def unwrap(tensor: FunctionalTensor) -> torch.Tensor:
    torch._sync(tensor)  # pyright: ignore[reportPrivateImportUsage]
    return torch._from_functional_tensor(tensor.elem)  # pyright: ignore[reportPrivateImportUsage]


def is_autocast(node: fx.Node) -> bool:
    return node.target in (ENTER_AUTOCAST, EXIT_AUTOCAST)
