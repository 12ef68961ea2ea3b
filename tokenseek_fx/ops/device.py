"""Where the Triton kernels run."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """True for a tensor on a CUDA device where triton is installed (it comes with PyTorch's CUDA wheels on Linux)."""
    return x.device.type == "cuda" and _HAS_TRITON
