"""Code that depends on the version of PyTorch, or on names that PyTorch doesn't publish."""

from __future__ import annotations

import copy
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__)
_DYNAMO = os.path.join(_TORCH, "_dynamo")
_RESUME_PREFIX = "torch_dynamo_resume_in_"


class _OnceLoggers(set):
    """Dynamo's set of functions to ignore, extended by ``logger.warning_once`` and related methods.

    transformers adds these to all loggers. They are looked up late: it may be imported after this package.
    """

    _NAMES = ("warning_once", "info_once", "warning_advice")

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        yield from (getattr(logging.Logger, name) for name in self._NAMES if hasattr(logging.Logger, name))

    def __contains__(self, function: object) -> bool:
        return any(function is known for known in self)


def ignore_logging_in_forward() -> None:
    """Let Dynamo skip ``logger.warning_once``, which would otherwise break the graph."""
    import torch._dynamo.config as config

    config.ignore_logging_functions = _OnceLoggers(config.ignore_logging_functions)


def graph_break(gm: fx.GraphModule) -> tuple[str, str, int] | None:
    """``(reason, file, line)`` of the graph break that ended this graph; None without one."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    frames = [*reversed(why.user_stack)]
    frame = next((frame for frame in frames if not frame.filename.startswith(_TORCH)), next(iter(frames), None))
    return _first_line(why.reason), frame.filename if frame else "", (frame.lineno or 0) if frame else 0


def resumed_at() -> tuple[str, int] | None:
    """``(file, line)`` where Dynamo split a function whose rest it compiles; None if it compiles a whole function."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code = InstructionTranslator.current_tx().f_code
    except AttributeError:
        return None
    name, _, line = code.co_name.rpartition("_at_")
    return (code.co_filename, int(line)) if name.startswith(_RESUME_PREFIX) else None


def modules_outside() -> list[tuple[types.CodeType, torch.nn.Module]]:
    """Modules whose code runs around the frame that Dynamo compiles, innermost first, with that code.

    It runs as plain Python, or Dynamo split it. The modules are searched on the stack, from here up to the call of the
    compiled function. torch's own modules (DDP) don't count.
    """
    frame, outside = sys._getframe(1), list[tuple[types.CodeType, torch.nn.Module]]()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if code.co_filename.startswith(_DYNAMO):
            outside.clear()  # what it compiles for
        elif isinstance(owner, torch.nn.Module) and _is_method(code, owner):
            outside.append((code, owner))
        frame = frame.f_back
    return outside if frame is not None else []


def _is_method(code: types.CodeType, owner: torch.nn.Module) -> bool:
    """True for code of a method of ``owner``, by its names; methods of torch don't count."""
    classes = [base.__name__ for base in type(owner).__mro__]
    named = code.co_varnames[0] == "self" or code.co_qualname.rpartition(".")[0] in classes
    return named and not code.co_filename.startswith(_TORCH)


def is_split(code: types.CodeType) -> bool:
    """True for code that Dynamo wrote, which calls the parts of a function that it split."""
    return any(name.startswith(("__compiled_fn", "__resume_at")) for name in code.co_names)


def compiled_call() -> Any:
    """The ``torch.compile`` whose call is running, innermost on the stack; None outside of one."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def skipped_at(code: types.CodeType) -> tuple[str, str, int] | None:
    """``(reason, file, line)`` of the graph break at which Dynamo left a function to Python; None if it did not.

    For a break inside of torch, the place is that of the function.
    """
    place = (code.co_filename, code.co_firstlineno)
    for told in reversed(torch._dynamo.utils.get_compilation_metrics()):
        if (told.co_filename, told.co_firstlineno) == place and told.fail_reason:
            found = (told.fail_user_frame_filename or _TORCH, told.fail_user_frame_lineno or 0)
            return _first_line(told.fail_reason), *(place if found[0].startswith(_TORCH) else found)
    return None


def _first_line(text: Any) -> str:
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "")


def is_sharded(module: torch.nn.Module) -> bool:
    """True for a module that ``fully_shard`` (FSDP2) shards."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def compiled_twice() -> bool:
    """True if two ``torch.compile`` calls of one module are on the stack; only the inner one compiles anything."""
    frame, contexts = sys._getframe(1), {}
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            module, context = getattr(frame.f_locals["fn"], "__self__", None), frame.f_locals["self"]
            if isinstance(module, torch.nn.Module) and contexts.setdefault(module, context) is not context:
                return True
        frame = frame.f_back
    return False


def inductor(mode: str | None, options: dict[str, Any] | None) -> Any:
    """Inductor as ``torch.compile(mode=..., options=...)`` calls it."""
    _mend_inductor()
    return torch._TorchCompileInductorWrapper(mode, options, None)


@cache
def _mend_inductor() -> None:
    """Patch two bugs that make Inductor's C++ silently wrong in all supported versions.

    - pytorch#191837: with several threads, the index of an atomic addition counts the offset inside a transposed tile
      twice. Gradients of small tables (T5's position bias) are wrong, and memory beside them is overwritten.
    - When loops are reordered for fusion, a reader loses its dependency on an earlier write to its buffer (#177631
      keeps it only if the reader has other such dependencies): the gradient of experts' inputs was read before it was
      summed.
    """
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppTile2DKernel, CppVecKernel
    from torch._inductor.dependencies import StarDep, WeakDep
    from torch._inductor.scheduler import SchedulerNode
    from torch.utils._ordered_set import OrderedSet

    store, recompute = CppTile2DKernel.store, SchedulerNode.recompute_size_and_body

    def store_once(self: CppTile2DKernel, name: str, index: Any, value: Any, mode: Any = None) -> None:
        shared = mode == "atomic_add" and (config.cpp.dynamic_threads or self.num_threads != 1)
        if shared and not self.need_vec_transpose(self.rename_indexing(index)):
            return CppVecKernel.store(self, name, index, value, mode)  # adds the offset itself
        return store(self, name, index, value, mode)

    def recompute_in_order(self: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        added = OrderedSet([dep for dep in self.read_writes.reads if isinstance(dep, (WeakDep, StarDep))])
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.with_read(added).rename(self.mutation_renames))

    CppTile2DKernel.store = store_once
    SchedulerNode.recompute_size_and_body = recompute_in_order
    torch.compiler.config.cache_key_tag += "mended by tokenseek_fx"  # cached code was generated without the patches


def aot_eager(partition: Callable[..., Any]) -> Callable[..., Any]:
    """The backend ``aot_eager`` with another partitioner."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    compilers = {"fw_compiler": boxed_nop, "bw_compiler": boxed_nop}
    return aot_autograd(**compilers, partition_fn=partition, keep_inference_input_mutations=True)


def reaches_recompile_limit() -> int | None:
    """Dynamo's recompile limit during the last compilation of a function that it allows; None if more are allowed."""
    from torch._guards import CompileContext

    running, limit = CompileContext.current_compile_id(), torch._dynamo.config.recompile_limit
    return limit if running is not None and (running.frame_compile_id or 0) + 1 == limit else None


def unlimited_recompiles() -> Any:
    """A context without Dynamo's recompile limits."""
    return torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20)


def body_of_custom_op(operation: Any) -> Any:
    """The Python function behind a ``torch.library.custom_op`` of this package; None for any other operation."""
    from torch._library.custom_ops import OPDEFS

    if getattr(operation, "namespace", None) != "tokenseek_fx":
        return None
    definition = OPDEFS.get(operation._schema.name)
    return definition._init_fn if definition is not None else None


def without_idle_results(node: fx.Node, forward: fx.GraphModule, backward: fx.GraphModule) -> tuple[Any, Any, int]:
    """The bodies of a custom function without trailing results that are unused and whose gradient is not read.

    Returns (forward, backward, number of results). PyTorch 2.11 also returns intermediate values of the forward.
    """
    results, gradients = _results(forward.graph)[0], backward.graph.find_nodes(op="placeholder")
    used = [user.args[1] for user in node.users] + [i for i in range(len(results)) if gradients[i].users]
    count = max(used, default=0) + 1
    if count == len(results):
        return forward, backward, count
    forward_graph, backward_graph = copy.deepcopy(forward.graph), copy.deepcopy(backward.graph)
    results, saved = _results(forward_graph)
    forward_graph.output_node().args = ((results[:count], saved),)
    for idle in backward_graph.find_nodes(op="placeholder")[count : len(results)]:
        backward_graph.erase_node(idle)
    return fx.GraphModule(forward, forward_graph), fx.GraphModule(backward, backward_graph), count


def _results(forward: fx.Graph) -> Any:
    """(results, saved values) of the forward body of a custom function."""
    return forward.output_node().args[0]


def wrap_kernel(kernel: Any) -> Any:
    """``torch.library.wrap_triton``; PyTorch 2.11 doesn't wrap kernels that Triton's interpreter runs."""
    import triton

    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def called_in_place(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The call that ``module.compile()`` sets to run instead of the module's forward; None if not set."""
    return module._compiled_call_impl


def call_in_place(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Let ``module(...)`` run ``call``, or with None its forward. Class, signature and ``state_dict`` don't change."""
    module._compiled_call_impl = call  # pyright: ignore[reportAttributeAccessIssue]


class _CopiedCall:
    """Carries the context of ``torch.compile`` from a module compiled in place to its copy; it is pickled as False."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __deepcopy__(self, memo: Any) -> _CopiedCall:
        return self

    def __reduce__(self) -> Any:
        return bool, ()


def compile_copies_of(package: str) -> None:
    """Let ``copy.deepcopy`` of a module that is compiled in place by a backend of ``package`` give a compiled module.

    PyTorch drops the compiled call, so a copy would train on all tokens without a word: its forward never reaches the
    backend. Pickles have no compiled call, as in PyTorch.
    """
    name, get_state, set_state = "_tokenseek_compiled", torch.nn.Module.__getstate__, torch.nn.Module.__setstate__

    def state_with_call(self: torch.nn.Module) -> dict[str, Any]:
        state, context = get_state(self), _context_of(self._compiled_call_impl)
        if getattr(_backend_of(context), "__module__", "").partition(".")[0] == package:
            state[name] = _CopiedCall(context)
        return state

    def set_state_and_call(self: torch.nn.Module, state: dict[str, Any]) -> None:
        copied = state.pop(name, None)
        set_state(self, state)
        if copied:
            call_in_place(self, copied.context(self._call_impl))

    torch.nn.Module.__getstate__, torch.nn.Module.__setstate__ = state_with_call, set_state_and_call


def _context_of(call: Any) -> Any:
    """The context of ``torch.compile`` that a compiled function runs in; None for any other function."""
    names = getattr(getattr(call, "__code__", None), "co_freevars", ())
    return call.__closure__[names.index("self")].cell_contents if "self" in names else None


def _backend_of(context: Any) -> Any:
    """The backend that the user named, behind Dynamo's wrappers."""
    found = getattr(context, "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return getattr(found, "compiler_fn", found)


def adds_to_grad(value: torch.Tensor) -> bool:
    """True if the running backward adds to ``value.grad``, and nothing else sees the gradient that is added.

    ``torch.autograd.grad`` returns gradients instead, and hooks may read or change them.
    """
    hooks = (value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None))
    if not value.is_leaf or value.grad is None or any(hooks):
        return False
    if value.grad.is_sparse or type(value.grad) is not torch.Tensor or value.grad.dtype is not value.dtype:
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(value).node)
    except RuntimeError:  # torch.autograd.grad
        return False
