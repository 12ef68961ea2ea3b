"""Without a GPU, Triton kernels run in Triton's interpreter, which must be enabled before triton is imported."""

from __future__ import annotations

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector, which Dynamo calls often, need not look through it."""
    gc.collect()
    gc.freeze()
