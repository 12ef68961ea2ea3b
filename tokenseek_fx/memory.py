"""The memory of a compiled training step, computed without running it.

Inductor generates programs of allocations, kernels and frees for forward and backward. Here they run on fake tensors,
with kernels that do nothing, under the real autograd. So the live bytes are known at each line, after fusion and buffer
reuse, and no kernel is compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import compat
from .ops.attention_blocks import ScoreSpec
from .ops.device import HALF
from .ops.head import TILE_BYTES
from .passes.lower.chunks import CHUNK_BYTES
from .passes.memory.saved import kind_of_saved

_DEVICES = ("cpu", "cuda", "xpu", "mtia")
#: Operations with Triton kernels on a GPU, and the dtypes of these kernels, which hold nothing but their results.
_KERNELS = {
    **dict.fromkeys(
        (
            "selected_attention",
            "selected_attention_grad_query",
            "selected_attention_grad_keys",
            "selected_attention_grad_every",
            "attention_received",
        ),
        (*HALF, torch.float32),
    ),
    "head_loss": HALF,
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a compiled forward and backward hold beside parameters, inputs and gradients that existed before.

    ``saved``: bytes between forward and backward, by kind. ``forward``, ``backward``: the peak of each; it includes
    gradients that the backward allocates.
    """

    saved: Mapping[str, int] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0


def step_memory(
    compile: Callable[[], Callable[..., Sequence[Any]]], inputs: Sequence[Any], set_to_none: bool = True
) -> StepMemory:
    """The memory of a training step of the graph that ``compile`` compiles by Inductor.

    ``inputs``: fake tensors that exist before the step; unless ``set_to_none``, those that require grad have gradients.
    The backward starts at the loss, or at all outputs if none is a scalar; other outputs are freed before it.
    """
    live, mode = Live(), _mode_of(inputs)
    with _planning(live), tracing(TracingContext(mode)):
        compiled = compile()
    leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    live.ignore(x for x in leaves if isinstance(x, Tensor))
    if not set_to_none:
        _give_gradients(leaves, live)
    with mode, live, torch.enable_grad():
        losses = _losses(compiled(*leaves))
        live.add([])
        saved, forward = live.by_kind(losses), live.forget_peak()
        torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
    return StepMemory(saved, forward, live.peak)


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Inside the context, chunks and tiles on the CPU have the size of those on ``device`` and count as its kernels."""
    with ExitStack() as stack:
        for sizes in (CHUNK_BYTES, TILE_BYTES):
            stack.enter_context(patch.dict(sizes, cpu=sizes[device]))
        stack.enter_context(patch.object(Live, "kernels", _KERNELS if device == "cuda" else {}))
        yield


def _mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    return next(x.fake_mode for x in inputs if isinstance(x, Tensor))  # type: ignore[attr-defined]


def _give_gradients(leaves: Sequence[Any], live: Live) -> None:
    with _mode_of(leaves):
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.grad = torch.empty_like(leaf)
                live.ignore([leaf.grad])


def _losses(outputs: Sequence[Any]) -> list[Tensor]:
    differentiable = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    return [x for x in differentiable if not x.ndim][:1] or differentiable


class Live(TorchDispatchMode):
    """Counts the live bytes of the storages allocated under this mode.

    ``peak``: the maximum so far. ``kernels``: operation name -> dtypes of its first input for which it holds nothing
    but its results.
    """

    kernels: Mapping[str, tuple[torch.dtype, ...]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.kinds: dict[int, str] = {}
        self.ignored: dict[int, Tensor] = {}
        self.peak = 0

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Exclude the storages of ``tensors`` from now on."""
        self.ignored.update((x.untyped_storage()._cdata, x) for x in tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors``, each once."""
        self.storages = {key: known for key, known in self.storages.items() if not known[0].expired()}
        for x in tensors:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.ignored and key not in self.storages:
                self.storages[key] = (StorageWeakRef(storage), storage.nbytes())
                self.kinds.pop(key, None)  # of a freed storage at the same address
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))

    def note(self, x: Tensor, kind: str) -> None:
        """Set the kind that the storage of ``x`` is counted as, unless it has one."""
        self.kinds.setdefault(x.untyped_storage()._cdata, kind)

    def by_kind(self, without: Iterable[Tensor] = ()) -> dict[str, int]:
        """Live bytes by kind, leaving out the storages of ``without``."""
        hidden = {x.untyped_storage()._cdata for x in without}
        counts: Counter[str] = Counter()
        for key, (_, size) in self.storages.items():
            if key not in hidden:
                counts[self.kinds.get(key, "activations")] += size
        return dict(counts)

    def forget_peak(self) -> int:
        """Return the peak so far, and reset it to 0."""
        peak, self.peak = self.peak, 0
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = compat.body_of_custom_op(func)
        if body is None or args[0].dtype in self.kernels.get(func._opname, ()):
            result = func(*args, **(kwargs or {}))
        else:  # its body consists of PyTorch operations, whose temporaries count
            with _largest_blocks(), _LargestResults(), self:
                result = body(*args, **(kwargs or {}))
        self.add(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        return result


class _LargestResults(TorchDispatchMode):
    """Assumes the worst case where results depend on data: the largest sizes, and conditions that are true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.is_nonzero.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


@contextmanager
def _largest_blocks() -> Iterator[None]:
    """Inside the context, all blocks of attention are as large as those of the last rows, which see all keys."""
    every = lambda spec, instances, rows: slice(0, spec.keys.shape[1])  # noqa: E731
    with patch.object(ScoreSpec, "seen", every), patch.object(ScoreSpec, "start", None):
        yield


def _planning(live: Live) -> ExitStack:
    """A context in which Inductor generates its programs, but compiles no kernel and uses no cache."""
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.codecache import PyCodeCache

    uncached = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "cpp_wrapper": False}
    now = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with ExitStack() as stack:
        stack.enter_context(config.patch(uncached))
        stack.enter_context(torch._functorch.config.patch(now))
        stack.enter_context(patch.object(PyCodeCache, "load_by_key_path", partial(_load, live)))
        # detecting the vector instructions of the processor would need a C++ compiler
        stack.enter_context(patch.object(cpu_vec_isa, "valid_vec_isa_list", list))
        return stack.pop_all()


def _load(
    live: Live, key: str, path: str, linemap: Any = None, attrs: Mapping[str, Any] | None = None, **_: Any
) -> ModuleType:
    """Load a program generated by Inductor, with kernels that do nothing and fake allocations."""
    from torch._inductor import async_compile
    from torch._inductor.virtualized import V

    module = ModuleType("planned")
    module.__file__ = path
    with patch.object(async_compile, "AsyncCompile", _NoKernels):
        exec(compile(Path(path).read_text(), path, "exec"), vars(module))
    fakes = {f"empty_strided_{device}": _allocation(device) for device in _DEVICES}
    vars(module).update({**fakes, **(attrs or {}), "reinterpret_tensor": _reinterpreted})
    vars(module).update(dict.fromkeys(("assert_size_stride", "assert_alignment"), _nothing))
    if not V.graph.is_backward:
        module.call = _noting(module.call, _kinds_of_outputs(V.graph.orig_gm), live)
    return module


def _noting(call: Callable[[list], Sequence[Any]], kinds: Sequence[str], live: Live) -> Callable[[list], Sequence[Any]]:
    """A forward that notes the kinds of its outputs, including the saved ones."""

    def noting(args: list) -> Sequence[Any]:
        outputs = call(args)
        for output, kind in zip(outputs, kinds, strict=True):
            if isinstance(output, Tensor):
                live.note(output, kind)
        return outputs

    return noting


def _kinds_of_outputs(module: torch.fx.GraphModule) -> list[str]:
    outputs: Any = module.graph.output_node().args[0]
    return [kind_of_saved(x) if isinstance(x, torch.fx.Node) else "activations" for x in outputs]


class _NoKernels:
    """Replaces Inductor's ``AsyncCompile``: all kernels, however they are compiled and launched, do nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: _NoKernel()


class _NoKernel:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def run(self, *args: Any, **kwargs: Any) -> None:
        return None


def _nothing(*args: Any) -> None:
    return None


def _reinterpreted(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return torch.as_strided(x, size, stride, x.storage_offset() + offset)


def _allocation(device: str) -> Callable[..., Tensor]:
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)
