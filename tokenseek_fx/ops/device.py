"""Whether the Triton kernels run on a device."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """True for a tensor on a CUDA device if triton is installed (PyTorch's CUDA wheels on Linux include it)."""
    return x.device.type == "cuda" and _HAS_TRITON
