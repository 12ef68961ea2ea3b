"""Fake tensors: shapes and dtypes without computing values."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils import _pytree as pytree


def fake_inputs(module: fx.GraphModule, inputs: Iterable[Any]) -> tuple[Any, ...]:
    """``inputs`` as fake tensors of one mode: that of the running compilation, that of the inputs, or a new one."""
    inputs = tuple(inputs)
    context = TracingContext.try_get()
    mode = (context.fake_mode if context else None) or detect_fake_mode(inputs) or FakeTensorMode()
    contexts = context.tensor_to_context if context else {}
    return tuple(_fake(mode, x, contexts) if isinstance(x, torch.Tensor) else x for x in inputs)


def _fake(mode: FakeTensorMode, x: torch.Tensor, contexts: Any) -> torch.Tensor:
    """``x`` in ``mode``, with the symbols that Dynamo assigned to its sizes."""
    if isinstance(x, FakeTensor):
        return x
    if x not in contexts:
        return mode.from_tensor(x, static_shapes=True)
    symbols = contexts[x]
    return mode.from_tensor(x, static_shapes=False, symbolic_context=symbols, source=symbols.tensor_source)


def fake_mode_of(values: Any) -> AbstractContextManager:
    """The fake mode of the fake tensors in ``values``; a null context if there are none."""
    leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return detect_fake_mode(leaves) or nullcontext()


def varying(mode: FakeTensorMode, x: torch.Tensor) -> torch.Tensor:
    """A vector like ``x`` in ``mode`` whose length is a symbol."""
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None])
    real = torch.empty(x.shape, dtype=x.dtype, device="meta")
    found = mode.from_tensor(real, static_shapes=False, symbolic_context=context, source=ConstantSource("varying"))
    with mode:
        return torch.empty(found.shape, dtype=x.dtype, device=x.device)
