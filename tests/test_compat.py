"""Fixes of errors in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import fresh_cache

from tokenseek_fx import compat


@pytest.mark.simd
def test_threads_add_to_the_right_places():
    """The gradient of a position bias [buckets, heads] from transposed tiles (pytorch#191837)."""

    def grad_of_table(one, other, mask, buckets):
        grad = one + torch.where(mask, other.sum(0, keepdim=True), 0.0)
        return torch.ops.aten.embedding_dense_backward(grad.squeeze(0).permute(1, 2, 0), buckets, 32, -1, False)

    torch.manual_seed(0)
    one, other = torch.randn(1, 64, 64, 4).permute(0, 3, 1, 2), torch.randn(7, 4, 64, 64)
    inputs = one, other, torch.rand(64, 64) > 0.3, torch.randint(32, (64, 64))
    torch._dynamo.reset()
    backend = compat.inductor(None, {"cpp.threads": 2})
    with fresh_cache():
        result = torch.compile(grad_of_table, backend=backend)(*inputs)
    torch.testing.assert_close(result, grad_of_table(*inputs), rtol=1e-4, atol=1e-4)
