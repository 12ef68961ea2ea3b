"""Keys/values modes: how keys and values of all tokens are kept from the forward to the backward.

The forward of a block always uses them as they are. A mode may save other tensors in their place (``store``) and compute keys and
values from these in the backward (``restore``). Both add nodes to the graphs that AOTAutograd partitioned. A mode is one value;
``register_kv_mode`` makes it a value of ``Config.kv``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.emit import emit
from ..graph.kinds import Kind, Mark, tag
from ..graph.nodes import bytes_hint
from ..graph.registry import Registry

aten = torch.ops.aten
_CONVERT, _MOVE = torch.ops.prims.convert_element_type.default, torch.ops.prims.device_put.default
FP8 = torch.float8_e4m3fn
#: Triton converts to it from this compute capability on.
_CONVERTS_FP8 = (8, 9)
#: Of magnitudes: a head that is 0 throughout has a scale too.
_SMALLEST = 1e-30


@dataclass(frozen=True)
class KVMode:
    """One way of keeping keys and values.

    Args:
        name: the value of ``Config.kv``.
        check: ``check(device, is_inductor)`` returns why the mode can't be used there (fact and remedy), or "".
        kept_bytes: bytes on the device for one key or value, given its node.
        store: adds nodes to the forward graph and returns what is saved in place of a key or value ``[B, H, S, E]``.
        restore: ``restore(old, stored)`` adds nodes to the backward graph and returns the value in place of ``old``.
        is_exact: False: the backward recomputes attention from the restored values. Attention weights are exp(scores - lse); with
            rounded keys and the exact log-sum-exp they would not sum to 1.
        recomputes: keys and values are recomputed from smaller values instead (``recompute_kv.py``).
    """

    name: str
    check: Callable[[torch.device, bool], str] = lambda device, is_inductor: ""
    kept_bytes: Callable[[fx.Node], float] = bytes_hint
    store: Callable[[fx.Node], Sequence[fx.Node]] | None = None
    restore: Callable[[fx.Node, Sequence[fx.Node]], fx.Node] | None = None
    is_exact: bool = True
    recomputes: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its name: Inductor's cache keys hold it, and a lambda can't be pickled."""
        return _named, (self.name,)


KV_MODES: Registry[KVMode] = Registry("keys/values mode")


def _named(name: str) -> KVMode:
    return KV_MODES[name]


def register_kv_mode(mode: KVMode) -> KVMode:
    """Let ``Config(kv=mode.name)`` mean ``mode``.

    Raises:
        ValueError: another mode has the name.
    """
    KV_MODES.register([mode.name], mode)
    return mode


def _no_host(device: torch.device, is_inductor: bool) -> str:
    if device.type != "cpu":
        return ""
    return "kv='offload' has no effect: the model is on the CPU, and so are keys and values. Use kv='keep'."


def _on_host(node: fx.Node) -> list[fx.Node]:
    """Not waited for: all copies of a graph are in order on one stream. Inductor makes the target pinned memory."""
    stored = emit(node, _MOVE, node, torch.device("cpu"), True)
    tag(stored, Kind.HOST, Mark.ON_HOST)
    return [stored]


def _on_device(old: fx.Node, stored: Sequence[fx.Node]) -> fx.Node:
    return emit(stored[0], _MOVE, stored[0], old.meta["val"].device, True)


def _no_fp8(device: torch.device, is_inductor: bool) -> str:
    if device.type != "cuda" or not torch.cuda.is_available() or not is_inductor:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _CONVERTS_FP8:
        return ""
    has = ".".join(map(str, capability))
    return (
        f"kv='fp8': Triton converts float8_e4m3fn from compute capability 8.9 on, this GPU has {has}. Use kv='offload'."
    )


def _rounded(node: fx.Node) -> list[fx.Node]:
    """A value in 8 bits, and its scale: the largest magnitude of the last two dims (of a head) over the largest of the format."""
    value = emit(node, _CONVERT, node, torch.float32)
    largest = emit(node, aten.amax.default, emit(node, aten.abs.default, value), [-2, -1], True)
    scale = emit(node, aten.div.Tensor, emit(node, aten.clamp_min.default, largest, _SMALLEST), torch.finfo(FP8).max)
    small = emit(node, _CONVERT, emit(node, aten.div.Tensor, value, scale), FP8)
    for stored in (small, scale):
        tag(stored, Kind.KEYS_VALUES)
    return [small, scale]


def _unrounded(old: fx.Node, stored: Sequence[fx.Node]) -> fx.Node:
    small, scale = stored
    value = emit(small, _CONVERT, small, torch.float32)
    value = emit(small, aten.mul.Tensor, value, scale)
    return emit(small, _CONVERT, value, old.meta["val"].dtype)


KEEP = register_kv_mode(KVMode("keep"))
RECOMPUTE = register_kv_mode(KVMode("recompute", recomputes=True))
OFFLOAD = register_kv_mode(
    KVMode("offload", check=_no_host, kept_bytes=lambda node: 0, store=_on_host, restore=_on_device)
)
FP8_MODE = register_kv_mode(
    KVMode(
        "fp8",
        check=_no_fp8,
        kept_bytes=lambda node: bytes_hint(node) / node.meta["val"].element_size(),
        store=_rounded,
        restore=_unrounded,
        is_exact=False,
    )
)
