"""Where tests of Triton kernels can run, and which PyTorch they meet."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

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
