"""Without a GPU, Triton kernels run in Triton's interpreter, which must be enabled before triton is imported."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor.config
from functorch.compile import make_boxed_func
from torch import fx

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _no_internal_errors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An internal error fails the test, also where its warning is expected or ignored, except in ``injects_faults``."""
    errors = sys.modules.get("tokenseek_fx.passes.graph.errors")
    if errors is None or request.node.get_closest_marker("injects_faults"):
        yield
        return
    found, failed = [], errors._failed
    monkeypatch.setattr(errors, "_failed", lambda error: (found.append(failed(error)), found[-1])[1])
    yield
    assert not found, found[0]


@pytest.fixture(autouse=True)
def _scalar_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """C++ without SIMD, which compiles a quarter faster; tests marked ``simd`` compile the kernels that users run."""
    simd = request.node.get_closest_marker("simd") is not None
    with torch._inductor.config.patch({} if simd else {"cpp.simdlen": 1}):
        yield


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor without its C++: graphs are traced, decomposed and partitioned as for users, and then interpreted."""
    from torch._inductor.compile_fx import compile_fx

    from tokenseek_fx import compat

    def interpreted(gm: fx.GraphModule, *_: Any, **__: Any) -> Any:
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(compat, "inductor", lambda mode, options: partial(compile_fx, inner_compile=interpreted))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector, which Dynamo calls often, need not look through it."""
    gc.collect()
    gc.freeze()
