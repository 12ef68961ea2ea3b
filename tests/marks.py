"""Which tests are slow, where those of Triton kernels can run, and which PyTorch they meet."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
import torch

#: Of PyTorch, as in (2, 13).
PYTORCH = tuple(map(int, torch.__version__.split(".")[:2]))
_HAS_CUDA = torch.cuda.is_available()
_NEW_TRITON = find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
needs_triton = pytest.mark.skipif(
    not (_HAS_CUDA or _NEW_TRITON),
    reason="without a GPU the kernels need triton 3.7: the interpreter of 3.6 does not run with numpy 2.4",
)
needs_new_triton = pytest.mark.skipif(
    not _NEW_TRITON,
    reason="the registers are those of triton 3.7: of 3.6, one kernel in float32 spills 8 bytes on sm_80",
)
needs_cuda = pytest.mark.skipif(not _HAS_CUDA, reason="needs a CUDA device")


def _lse_of_float64() -> torch.dtype:
    q = torch.empty(1, 1, 2, 8, dtype=torch.float64, device="meta")
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[1].dtype


needs_float64_attention = pytest.mark.skipif(
    _lse_of_float64() is not torch.float64,
    reason="PyTorch 2.11 says float32 of the log-sum-exp of attention in float64 on CPUs: Inductor's buffers are of that type",
)


def slow(*values: Any) -> Any:
    """A set of parameters whose test is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
