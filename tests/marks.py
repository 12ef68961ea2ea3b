"""Marks: which tests are slow, where tests of Triton kernels can run, and the version of PyTorch."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
import torch

#: The version of PyTorch, for example (2, 13).
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
    reason="PyTorch 2.11 declares the log-sum-exp of float64 attention on CPUs as float32, and so does Inductor",
)


def slow(*values: Any) -> Any:
    """Parameters of a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)
