"""Where tests of Triton kernels can run."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

_HAS_CUDA = torch.cuda.is_available()
_INTERPRETS = find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
needs_triton = pytest.mark.skipif(
    not (_HAS_CUDA or _INTERPRETS),
    reason="without a GPU the kernels need triton 3.7: the interpreter of 3.6 does not run with numpy 2.4",
)
needs_cuda = pytest.mark.skipif(not _HAS_CUDA, reason="needs a CUDA device")


def _lse_of_float64() -> torch.dtype:
    q = torch.empty(1, 1, 2, 8, dtype=torch.float64, device="meta")
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[1].dtype


needs_float64_attention = pytest.mark.skipif(
    _lse_of_float64() is not torch.float64,
    reason="PyTorch 2.11 says float32 of the log-sum-exp of attention in float64 on CPUs: Inductor's buffers are of that type",
)
