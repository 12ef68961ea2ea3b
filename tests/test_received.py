"""Attention received: the operator compared with whole attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import needs_triton
from torch import Tensor
from torch.utils import _pytree as pytree

from tokenseek_fx.ops import received
from tokenseek_fx.ops.visibility import Visibility

B = 2
CASES = st.fixed_dictionaries(
    {
        "queries": st.integers(1, 9),
        "keys": st.integers(1, 9),
        "heads": st.sampled_from([(1, 1), (4, 2), (3, 3)]),
        "width": st.integers(1, 5),
        "mask": st.sampled_from([None, "bool", "keys", "additive", "lowest"]),
        "causal": st.booleans(),
        "window": st.sampled_from([0, 1, 3, 20]),
        "segments": st.sampled_from([0, 1, B]),  # instances
        "softcap": st.sampled_from([0.0, 1.5]),
        "scale": st.sampled_from([None, 0.7]),
        "lse": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)

NO_INTERPRETER = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Triton's interpreter multiplies the bits of bfloat16 as integers"
)


def masks(kind: str | None, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    """A mask of [B, H, L, S] or of fewer dims."""
    if kind is None:
        return None
    shown = torch.rand(shape[0], 1, 1 if kind == "keys" else shape[-2], shape[-1], generator=generator) < 0.7
    if kind in ("bool", "keys"):
        return shown
    noise = torch.randn(shape[-2:], generator=generator).to(dtype)
    return noise if kind == "additive" else noise.masked_fill(~shown[0, 0], torch.finfo(dtype).min)


def example(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Visibility, float | None, float]:
    """The arguments of a case."""
    generator = torch.Generator().manual_seed(case["seed"])
    heads, key_heads = case["heads"]
    keys = case["queries"] if case["segments"] else case["keys"]
    query = torch.randn(B, heads, case["queries"], case["width"], generator=generator).to(dtype)
    key = torch.randn(B, key_heads, keys, case["width"], generator=generator).to(dtype)
    mask = masks(case["mask"], (B, heads, case["queries"], keys), dtype, generator)
    segments = torch.randint(3, (case["segments"], keys), generator=generator).sort(-1).values
    visibility = Visibility(
        mask=mask, segments=segments if case["segments"] else None, causal=case["causal"], window=case["window"]
    )
    return query, key, visibility, case["scale"], case["softcap"]


def scores_of(query: Tensor, key: Tensor, visibility: Visibility, scale: Any, softcap: float) -> Tensor:
    """The whole map of masked scores, entry by entry as the definition says."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    seen = (j <= i) | (not visibility.causal)
    seen = seen & ((i - j).abs() < visibility.window) if visibility.window else seen
    segments, mask = visibility.segments, visibility.mask
    seen = seen if segments is None else seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = scores.masked_fill(~seen, -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask


def by_map(*args: Any) -> tuple[Tensor, Tensor]:
    """(what every key receives, log of the sum of exp of every query)."""
    scores = scores_of(*args)
    dead = scores.amax(-1, keepdim=True) < -1e4
    return scores.softmax(-1).masked_fill(dead, 0).sum(2), scores.logsumexp(-1)


@settings(max_examples=150, deadline=None)
@given(CASES, st.integers(1, 9))
def test_it_is_the_column_sum_of_the_attention_weights(case, rows):
    args = example(case, torch.float64)
    expected, lse = by_map(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(received, "BLOCK_BYTES", rows * expected.numel() * 8)
        found = received.received(*args, lse=lse if case["lse"] else None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_blocks_of_a_window_read_only_the_keys_in_reach():
    """Keys out of reach may have any value."""
    query, key = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    key[..., 4:, :] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(received, "BLOCK_BYTES", 2 * 8 * 4)
        found = received.received(query, key, Visibility(causal=True, window=2))
    assert found[..., :3].isfinite().all() and found[..., 4:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("full", [True, False])
def test_the_operator_keeps_its_contract(dtype, full):
    query, key = torch.randn(2, 4, 6, 8, dtype=dtype), torch.randn(2, 2, 6, 8, dtype=dtype)
    segments, lse = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), torch.zeros(2, 4, 6)
    everything = Visibility(mask=torch.ones(6, 6, dtype=torch.bool), causal=True, window=2, segments=segments)
    more = (0.3, 3.0, lse, *everything.flat()) if full else (None, 0.0, None, *Visibility().flat())
    torch.library.opcheck(received.attention_received, (query, key, *more))


@needs_triton
@settings(max_examples=60, deadline=None)
@given(CASES, st.sampled_from([(16, 32), (32, 16), (16, 16)]), st.integers(1, 45), st.integers(1, 45))
def test_the_kernels_equal_the_operator(case, sides, queries, keys):
    from tokenseek_fx.ops import received_triton

    case = {**case, "queries": queries, "keys": keys}
    query, key, visibility, *form = example(case, torch.float32)
    lse = by_map(query, key, visibility, *form)[1] if case["lse"] else None
    args = to_device((query, key, *form, lse, *visibility.flat()))
    sizes = received_triton.blocks(case["width"], torch.float32, True)
    with pytest.MonkeyPatch.context() as patch:
        sizes |= {"BLOCK_I": sides[0], "BLOCK_J": sides[1]}
        patch.setattr(received_triton, "blocks", lambda *how: sizes)
        found = received_triton.attention_received_triton(*args)
    torch.testing.assert_close(found, received.attention_received(*args), rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NO_INTERPRETER)])
def test_the_kernels_in_half_precision(dtype):
    from tokenseek_fx.ops.received_triton import attention_received_triton

    query, key = to_device((torch.randn(1, 2, 70, 24).to(dtype), torch.randn(1, 1, 70, 24).to(dtype)))
    form = (None, 0.0, None, *Visibility(causal=True).flat())
    found = attention_received_triton(query, key, *form)
    expected = received.attention_received(query, key, *form)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # both multiply as given, add in float32


def to_device(inputs: Any) -> Any:
    """On the GPU if there is one, otherwise in Triton's interpreter (see conftest.py)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs)
