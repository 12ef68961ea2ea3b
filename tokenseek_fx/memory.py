"""Memory of a compiled training step, without running it.

Inductor writes programs of allocations, kernels and frees for forward and backward. They are executed here on fake tensors, with
kernels that do nothing, and under the real autograd: what is alive is then known at every line, after fusion and reuse of buffers,
and no kernel is compiled.
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
from .ops.attention_blocks import Sight
from .ops.device import HALF
from .ops.head import TILE_BYTES
from .passes.lower.chunks import CHUNK_BYTES
from .passes.memory.saved import kind_of_saved

_DEVICES = ("cpu", "cuda", "xpu", "mtia")
#: Operations that Triton kernels do on a GPU, and in which dtypes: what is held there is what they give.
_KERNELS = {
    **dict.fromkeys(
        ("selected_attention", "selected_attention_grad_query", "selected_attention_grad_keys", "attention_received"),
        (*HALF, torch.float32),
    ),
    "head_loss": HALF,
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a compiled forward and backward hold beside parameters, inputs and gradients that were there before.

    ``saved``: between forward and backward, by kind. ``forward``, ``backward``: the most that is alive in each; gradients that
    the backward makes count.
    """

    saved: Mapping[str, int] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0


def step_memory(
    compile: Callable[[], Callable[..., Sequence[Any]]], inputs: Sequence[Any], set_to_none: bool = True
) -> StepMemory:
    """What a training step of the graph holds that ``compile`` gives to Inductor.

    ``inputs``: fake tensors that exist before the step, those that require grad with gradients unless ``set_to_none``. The
    backward starts at the loss, or at all outputs where none is a scalar; other outputs are given up before it.
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
    """Of what is on the CPU, chunks and tiles are as large as on ``device``, and done by its kernels."""
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
    """Bytes of the storages made under this mode that are still alive; ``peak``: the most there were at a time. ``kernels``: operations, by
    name, that hold nothing but their results where their first input is of one of these dtypes."""

    kernels: Mapping[str, tuple[torch.dtype, ...]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.kinds: dict[int, str] = {}
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
            key = storage._cdata
            if key not in self.ignored and key not in self.storages:
                self.storages[key] = (StorageWeakRef(storage), storage.nbytes())
                self.kinds.pop(key, None)  # of another that was there before
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))

    def note(self, x: Tensor, kind: str) -> None:
        """What a storage is counted as; the first kind stays."""
        self.kinds.setdefault(x.untyped_storage()._cdata, kind)

    def by_kind(self, without: Iterable[Tensor] = ()) -> dict[str, int]:
        """Bytes alive by kind."""
        hidden = {x.untyped_storage()._cdata for x in without}
        counts: Counter[str] = Counter()
        for key, (_, size) in self.storages.items():
            if key not in hidden:
                counts[self.kinds.get(key, "activations")] += size
        return dict(counts)

    def forget_peak(self) -> int:
        """The peak so far; another begins."""
        peak, self.peak = self.peak, 0
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = compat.body_of_custom_op(func)
        if body is None or args[0].dtype in self.kernels.get(func._opname, ()):
            result = func(*args, **(kwargs or {}))
        else:  # written in PyTorch operations: what it needs for itself counts
            with _largest_blocks(), _LargestResults(), self:
                result = body(*args, **(kwargs or {}))
        self.add(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        return result


class _LargestResults(TorchDispatchMode):
    """Sizes that depend on data are the largest that they can be, and what is done if there is anything to do is done."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.is_nonzero.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


@contextmanager
def _largest_blocks() -> Iterator[None]:
    """Blocks of attention are as large as those of the last rows, which see all keys."""
    every = lambda sight, instances, rows: slice(0, sight.keys.shape[1])  # noqa: E731
    with patch.object(Sight, "seen", every), patch.object(Sight, "start", None):
        yield


def _planning(live: Live) -> ExitStack:
    """Inductor plans everything and compiles nothing; nothing of it is found in a cache, or goes there."""
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.codecache import PyCodeCache

    uncached = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "cpp_wrapper": False}
    now = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    with ExitStack() as stack:
        stack.enter_context(config.patch(uncached))
        stack.enter_context(torch._functorch.config.patch(now))
        stack.enter_context(patch.object(PyCodeCache, "load_by_key_path", partial(_load, live)))
        # which vector instructions the processor has is found out with a C++ compiler
        stack.enter_context(patch.object(cpu_vec_isa, "valid_vec_isa_list", list))
        return stack.pop_all()


def _load(
    live: Live, key: str, path: str, linemap: Any = None, attrs: Mapping[str, Any] | None = None, **_: Any
) -> ModuleType:
    """A program that Inductor has written, with kernels that do nothing and fake allocations."""
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
    """A forward that tells what kind its outputs, those saved among them, are of."""

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
    """In place of Inductor's ``AsyncCompile``: every kernel, however it is compiled and launched, does nothing."""

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
