"""Memory of a compiled training step, without running it.

Inductor writes a program of allocations, kernels and frees for the forward and for the backward. That program is executed
here on fake tensors, with kernels that do nothing: what is alive is then known at every line, after fusion and reuse of
buffers, and no kernel is compiled.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import compat
from .passes.fake import fake_mode_of

_DEVICES = ("cpu", "cuda", "xpu", "mtia")


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a compiled forward and backward hold beside parameters, inputs and what autograd keeps of earlier steps.

    ``saved``: between forward and backward, by kind. ``forward``, ``backward``: the most that is alive in each; gradients that
    the backward makes count.
    """

    saved: Mapping[str, int] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0


def step_memory(
    module: fx.GraphModule, inputs: Sequence[Any], given: int, options: Mapping[str, Any] | None = None
) -> StepMemory:
    """What a training step of ``module`` holds, compiled by Inductor with ``options`` (its settings by name).

    ``inputs``: fake tensors; the first ``given`` of them exist before the step and are not counted. The first output is taken
    for the loss; all others are given up before the backward.
    """
    forward, backward = _planned(module, inputs, dict(options or {}))
    mode, live = fake_mode_of(inputs), Live()
    arguments = forward.inputs()
    live.ignore(x for x in arguments[:given] if isinstance(x, Tensor))
    live.add(x for x in arguments[given:] if isinstance(x, Tensor))
    outputs = forward.run(arguments, mode, live)
    loss, kept, saved = outputs[0], forward.saved(outputs), live.by_kind(forward.saved_kinds(outputs))
    most = live.forget_peak()
    del outputs, arguments
    with mode, live:
        arguments = [kept.pop(node.name) if node.name in kept else _like(node) for node in backward.placeholders]
    kept.clear()
    gradients = backward.run(arguments, mode, live)
    del gradients, loss
    return StepMemory(saved, most, live.peak)


class Live(TorchDispatchMode):
    """Bytes of the storages made under this mode that are still alive; ``peak``: the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ignored: dict[int, Tensor] = {}
        self.peak = 0

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never count the storages of ``tensors``."""
        self.ignored.update((x.untyped_storage()._cdata, x) for x in tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors``, each once."""
        self.storages = {key: known for key, known in self.storages.items() if not known[0].expired()}
        for x in tensors:
            storage = x.untyped_storage()
            if storage._cdata not in self.ignored and storage._cdata not in self.storages:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))

    def by_kind(self, kinds: Iterable[tuple[Tensor, str]]) -> dict[str, int]:
        """Bytes of tensors by their kind, every storage once."""
        sizes = {x.untyped_storage()._cdata: kind for x, kind in kinds}
        counts: Counter[str] = Counter()
        for key, kind in sizes.items():
            if key in self.storages:
                counts[kind] += self.storages[key][1]
        return dict(counts)

    def forget_peak(self) -> int:
        """The peak so far; another begins."""
        peak, self.peak = self.peak, 0
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = compat.body_of_custom_op(func)
        if body is None:
            result = func(*args, **(kwargs or {}))
        else:  # written in PyTorch operations: what it needs for itself counts
            with self:
                result = body(*args, **(kwargs or {}))
        self.add(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        return result


@dataclass(frozen=True)
class _Part:
    """Inductor's program for the forward or the backward. ``returned``: outputs of the forward before those saved."""

    graph: fx.Graph
    call: Callable[[list[Any]], Sequence[Any]]
    returned: int

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    def inputs(self) -> list[Any]:
        return [node.meta["val"] for node in self.placeholders]

    def run(self, arguments: list[Any], mode: Any, live: Live) -> Sequence[Any]:
        with torch.no_grad(), mode, live:
            return self.call(arguments)

    def saved(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """What is saved for the backward, by the names that its inputs have."""
        return {node.name: value for node, value in self._saved(outputs)}

    def saved_kinds(self, outputs: Sequence[Any]) -> list[tuple[Tensor, str]]:
        kinds = ((value, node.meta.get("custom", {})) for node, value in self._saved(outputs))
        return [(x, custom.get("tokenseek", "activations")) for x, custom in kinds if isinstance(x, Tensor)]

    def _saved(self, outputs: Sequence[Any]) -> list[tuple[fx.Node, Any]]:
        nodes = self.graph.output_node().args[0]
        return list(zip(nodes[self.returned :], outputs[self.returned :], strict=True))


def _planned(module: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> tuple[_Part, _Part]:
    """Inductor's programs of the forward and the backward of ``module``."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    parts: dict[bool, _Part] = {}

    def look(graph: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        code = compile_fx_inner(graph, example_inputs, **kwargs)
        metadata = TracingContext.get().fw_metadata
        call = getattr(code, "current_callable", None) or code
        parts[kwargs.get("is_backward", False)] = _Part(graph.graph, call, metadata.num_forward)
        return code

    with _no_kernels(), tracing(TracingContext(fake_mode_of(inputs))):
        compile_fx(copy.deepcopy(module), list(inputs), inner_compile=look, config_patches=options)
    return parts[False], parts[True]


def _no_kernels() -> ExitStack:
    """Inductor plans everything and compiles nothing; nothing of it is found in a cache, or goes there."""
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.codecache import PyCodeCache

    uncached = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "cpp_wrapper": False}
    now = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with ExitStack() as stack:
        stack.enter_context(config.patch(uncached))
        stack.enter_context(torch._functorch.config.patch(now))
        stack.enter_context(patch.object(PyCodeCache, "load_by_key_path", _load))
        # which vector instructions the processor has is found out with a C++ compiler
        stack.enter_context(patch.object(cpu_vec_isa, "valid_vec_isa_list", list))
        return stack.pop_all()


def _load(key: str, path: str, linemap: Any = None, attrs: Mapping[str, Any] | None = None, **_: Any) -> ModuleType:
    """A wrapper that Inductor has written, with kernels that do nothing and fake allocations."""
    from torch._inductor import async_compile

    module = ModuleType("planned")
    module.__file__ = path
    with patch.object(async_compile, "AsyncCompile", _NoKernels):
        exec(compile(Path(path).read_text(), path, "exec"), vars(module))
    fakes = {f"empty_strided_{device}": _allocation(device) for device in _DEVICES}
    vars(module).update({**fakes, **(attrs or {}), "reinterpret_tensor": _reinterpreted})
    vars(module).update(dict.fromkeys(("assert_size_stride", "assert_alignment"), _nothing))
    return module


class _NoKernels:
    """In place of Inductor's ``AsyncCompile``: every kernel, however it is compiled and launched, does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: _Nothing()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def run(self, *args: Any, **kwargs: Any) -> None:
        return None


def _nothing(*args: Any) -> None:
    return None


def _allocation(device: str) -> Callable[..., Tensor]:
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


def _reinterpreted(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, x.storage_offset() + offset)


def _like(node: fx.Node) -> Any:
    """The gradient that comes to the backward."""
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
