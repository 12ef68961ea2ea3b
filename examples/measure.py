"""Measurements of the demo and the benchmarks: peak resident memory, and bytes saved for backward."""

import ctypes
import gc
import threading
import time
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tokenseek_fx.peak import forget_peak, peak_bytes

CPU = torch.device("cpu")
PERIOD = 0.005  # seconds between two samples, if the system doesn't record the peak


def resident() -> int:
    """Resident bytes of this process."""
    return psutil.Process().memory_info().rss


def trim() -> None:
    """Return freed memory to the system, so that resident memory is memory in use."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: the baseline then includes memory that the allocator keeps
        return


class PeakMemory:
    """Peak resident bytes beyond those on entry: `with PeakMemory() as peak: ...; peak.bytes`."""

    def __enter__(self) -> "PeakMemory":
        trim()
        self.base, self.top, self.bytes = resident(), 0, 0
        self.exact = forget_peak(CPU)
        self.stop = threading.Event()
        self.sampler = threading.Thread(target=self._sample, daemon=True)
        if not self.exact:
            self.sampler.start()
        return self

    def _sample(self) -> None:
        while not self.stop.is_set():
            self.top = max(self.top, resident())
            time.sleep(PERIOD)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop.set()
        if self.exact:
            self.top = peak_bytes(CPU) or 0
        self.bytes = max(0, self.top - self.base)


def storages(tensors: list[Tensor]) -> set[int]:
    """The addresses of the tensors' storages."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def nodes(last: Any) -> set[Any]:
    """All nodes of autograd's graph. A model that Dynamo splits has several compiled functions in it."""
    found, ahead = set(), [last]
    while ahead:
        if (node := ahead.pop()) not in found:
            found.add(node)
            ahead += [before for before, _ in node.next_functions if before is not None]
    return found


def saved_bytes(model: nn.Module, batch: dict[str, Tensor], vocab: int) -> dict[str, int]:
    """Bytes that one forward saves for backward: each storage once, without parameters, buffers and inputs.

    Autograd's hooks see tensors of eager operations and of AOTAutograd's compiled functions. A tensor with a dim of
    size `vocab` counts as logits.
    """
    known = storages([*model.parameters(), *model.buffers(), *batch.values()])
    found: dict[int, tuple[str, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = ("logits" if vocab in tensor.shape else "activations", storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for node in nodes(loss.grad_fn):
        for tensor in getattr(node, "_tensors_no_vc_check", ()):  # AOTAutograd keeps these without hooks
            pack(tensor)
    loss.backward()
    kinds = ("activations", "logits")
    return {kind: sum(size for which, size in found.values() if which == kind) for kind in kinds}
