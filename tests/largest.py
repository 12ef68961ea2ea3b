"""The largest tensor that operations create."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """``bytes``: the size of the largest storage that an operation returned under this mode."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (x.untyped_storage().nbytes() for x in tree_leaves(out) if torch.is_tensor(x))
        self.bytes = max(self.bytes, *made, 0)
        return out
