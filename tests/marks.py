"""Where tests of Triton kernels can run."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest

_USABLE = find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
needs_triton = pytest.mark.skipif(
    not _USABLE, reason="the kernels need triton 3.7: the interpreter of 3.6 does not run with numpy 2.4"
)
