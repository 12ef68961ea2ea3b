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
