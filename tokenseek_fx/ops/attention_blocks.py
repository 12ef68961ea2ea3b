"""Selected attention in plain ATen operations, one block of rows at a time: the implementation for CPU.

A block is some instances and heads, a few rows, and the keys that any of these rows may see: keys after the last
position and before the window are skipped. Grouped query heads become rows of their key head, so keys and values are
never repeated. Backward recomputes the softmax of a block from the log-sum-exp of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .visibility import Visibility

#: Rows in a block, counted over all query heads of a key head: few, so that a block skips the keys after it, but enough
#: for efficient matrix products.
_ROWS = 128
#: Rows in a block for PyTorch's fused attention: its own block size for fewer than 192 rows.
_FUSED_ROWS = 32
#: Scores in a block, in elements: few enough to stay in the cache between operations.
_SCORES = 2**19
#: PyTorch's flash attention for CPU takes grouped heads in its backward, too.
_FLASH_BACKWARD_GROUPS = TorchVersion(torch.__version__) >= "2.13"
#: Scores in a block of several instances: fewer, since their keys are copied into one batch of matrices.
_SMALL = 2**18


@dataclass(frozen=True)
class ScoreSpec:
    """Which scores of rows and keys exist, and how they are computed; see ``selected_attention``.

    ``rows`` [B, k] and ``keys`` [B, n] are positions. In ``visibility`` the mask is [B, H or 1, k or 1, n] and the
    segments are [B, S]. ``weight``: one attention weight for all keys in backward; None: the softmax of the scores.
    """

    visibility: Visibility
    rows: Tensor | None
    keys: Tensor
    scale: float
    softcap: float
    weight: float | None = None

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, positions: Tensor | None, visibility: Visibility, scale: float | None,
        softcap: float,
    ) -> ScoreSpec:  # fmt: skip
        """The scores of all keys for the rows; arguments as in ``selected_attention``."""
        batch, width = query.shape[0], query.shape[-1]
        keys = torch.arange(key.shape[2], device=key.device).expand(batch, -1)
        scale = width**-0.5 if scale is None else scale
        return cls(visibility.expand(batch, key.shape[2]), positions, keys, scale, softcap)

    def at(self, columns: Tensor) -> ScoreSpec:
        """The scores of the keys at ``columns`` [B, m] for the same rows."""
        return replace(self, keys=columns, visibility=self.visibility.at_keys(columns))

    @property
    def same_for_all_rows(self) -> bool:
        return not (self.visibility.by_position or _rows_differ(self.visibility.mask))

    @property
    def start(self) -> int | None:
        """The first position if rows are consecutive, equal in all instances and see all keys up to them; else None."""
        if not self.visibility.only_causal:
            return None
        start, count = int(self.rows[0, 0]), self.rows.shape[1]
        return start if torch.equal(self.rows, self.keys[:, start : start + count]) else None

    def seen(self, i: slice, r: slice) -> slice:
        """The range of keys that rows ``r`` of instances ``i`` may see by position."""
        keys, begin, end = self.keys[i], 0, self.keys.shape[1]
        if not self.visibility.limits_reach:
            return slice(begin, end)
        rows = self.rows[i, r]
        first, last = self.visibility.reach(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
        if last is not None:
            end = int((keys <= last).sum(1).max())
        if first is not None:
            begin = int((keys < first).sum(1).min())
        return slice(min(begin, end), end)

    def bias(self, i: slice, r: slice, c: slice, dtype: torch.dtype) -> Tensor | None:
        """The bias of a block's scores: 0 or -inf, plus an additive mask; None if all keys are visible."""
        visibility = self.visibility.of_instances(i)
        visible = visibility.visible(None if self.rows is None else self.rows[i, r], self.keys[i, c])
        visible = None if visible is None else visible[:, None]
        mask = visibility.mask
        if mask is None:
            return None if visible is None else _added(visible, dtype)
        mask = mask[:, :, r if _rows_differ(mask) else slice(None), c]
        if mask.dtype is torch.bool:
            return _added(mask if visible is None else mask & visible, dtype)
        return mask.to(dtype) if visible is None else mask.to(dtype).masked_fill(~visible, -torch.inf)


def _rows_differ(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape[2] > 1


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for accumulation: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def rows_like(x: Tensor, width: int) -> Tensor:
    """An empty [B, H, k, width] for ``x`` [B, H, k, E], in the memory layout [B, k, H, width], which models flatten."""
    batch, heads, rows, _ = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


def lse_like(query: Tensor) -> Tensor:
    """An empty [B, H, k] in float32, or float64 for float64."""
    return query.new_empty(query.shape[:3], dtype=wide(query.dtype))


@dataclass(frozen=True)
class Block:
    """Slices of instances, query heads and rows; of their key heads and keys; the bias of their scores."""

    instances: slice
    heads: slice
    rows: slice
    key_heads: slice
    keys: slice
    bias: Tensor | None

    def of_rows(self, x: Tensor) -> Tensor:
        """The block of ``x`` [B, H, k, ...]."""
        return x[self.instances, self.heads, self.rows]

    def folded(self, x: Tensor) -> Tensor:
        """The block of ``x`` [B, H, k, E], with the rows of all query heads of a key head in one matrix."""
        return self.fold(self.of_rows(x).to(wide(x.dtype)))

    def fold(self, x: Tensor) -> Tensor:
        """[b, H, r, E] as [b h, G r, E]."""
        return x.unflatten(1, (self._key_heads, -1)).flatten(2, 3).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """[b h, G r, E] as [b, H, r, E]."""
        rows = self.rows.stop - self.rows.start
        return x.unflatten(1, (-1, rows)).unflatten(0, (-1, self._key_heads)).flatten(1, 2)

    @property
    def _key_heads(self) -> int:
        return self.key_heads.stop - self.key_heads.start

    def of_keys(self, x: Tensor) -> Tensor:
        """The block of ``x`` [B, Hkv, n, E], as [b h, n, E]: a view for one instance."""
        return x[self.instances, self.key_heads, self.keys].to(wide(x.dtype)).flatten(0, 1)

    def add(self, x: Tensor, part: Tensor) -> None:
        """Add to the block of ``x`` [B, Hkv, n, E]."""
        here = x[self.instances, self.key_heads, self.keys]
        here.add_(part.view(here.shape))


def _blocks(query: Tensor, key: Tensor, spec: ScoreSpec) -> Iterator[Block]:
    """The blocks that cover an attention, about ``_SCORES`` scores each."""
    (batch, heads, rows, _), key_heads, dtype = query.shape, key.shape[1], wide(query.dtype)
    groups = heads // key_heads
    height = min(rows, max(_ROWS // 4, _ROWS // groups))
    together = max(1, _SMALL // (heads * height * max(1, key.shape[2])))
    for i in _slices(batch, together):
        for r, c in _rows_and_keys(spec, i, rows, height, groups):
            bias = spec.bias(i, r, c, dtype)
            for h in _slices(key_heads, max(1, _SCORES // (together * groups * height * max(1, c.stop - c.start)))):
                g = slice(h.start * groups, h.stop * groups)
                yield Block(i, g, r, h, c, bias if bias is None or bias.shape[1] == 1 else bias[:, g])


def _rows_and_keys(spec: ScoreSpec, i: slice, rows: int, height: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """``height`` rows and the keys that they may see; fewer rows if one key head has more than ``_SCORES`` scores."""
    for r in _slices(rows, height):
        c = spec.seen(i, r)
        fit = max(1, _SCORES // (groups * max(1, c.stop - c.start)))
        if r.stop - r.start <= fit:
            yield r, c
        else:
            yield from ((part, spec.seen(i, part)) for part in _slices(r.stop, fit, r.start))


def _slices(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, spec: ScoreSpec) -> tuple[Tensor, Tensor]:
    """The output [B, H, k, Ev] and the log-sum-exp of the scores [B, H, k]; both are 0 for a row that sees no key."""
    fused = query.is_cpu and not spec.softcap and query.shape[-1] == value.shape[-1]
    out, lse = (_forward_fused if fused else _forward_blocks)(query, key, value, spec)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_((lse - total).exp_()[..., None])
        lse = total
    return out, lse


def _forward_fused(query: Tensor, key: Tensor, value: Tensor, spec: ScoreSpec) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention for CPU, which supports grouped heads and needs bounded memory."""
    flash = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, scale=spec.scale)
    # it reads the head dim as adjacent numbers without a check
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    start = spec.start
    if start == 0 or (start and query.dtype == wide(query.dtype)):  # two parts are added only if neither is rounded
        return _forward_consecutive(query, key, value, start, flash)
    out, lse = rows_like(query, value.shape[-1]), lse_like(query)
    batch, _, rows, _ = query.shape
    height = rows if spec.same_for_all_rows else min(rows, _FUSED_ROWS)
    for i in _slices(batch, max(1, _SCORES // max(1, height * key.shape[2]))):
        for r in _slices(rows, height):
            c = spec.seen(i, r)
            bias = spec.bias(i, r, c, lse.dtype)
            out[i, :, r], lse[i, :, r] = flash(query[i, :, r], key[i, :, c], value[i, :, c], attn_mask=bias)
    return out, lse


def _forward_consecutive(query: Tensor, key: Tensor, value: Tensor, start: int, flash: Any) -> tuple[Tensor, Tensor]:
    """Consecutive rows from ``start``: each sees all keys before ``start``, and those from there up to its own."""
    own = slice(start, start + query.shape[2])
    out, lse = flash(query, key[:, :, own], value[:, :, own], 0.0, True)
    if start:
        earlier, earlier_lse = flash(query, key[:, :, :start], value[:, :, :start])
        out.lerp_(earlier, (earlier_lse - lse).sigmoid_()[..., None])
        lse = torch.logaddexp(lse, earlier_lse)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def _forward_blocks(query: Tensor, key: Tensor, value: Tensor, spec: ScoreSpec) -> tuple[Tensor, Tensor]:
    out, lse = rows_like(query, value.shape[-1]), lse_like(query)
    for block in _blocks(query, key, spec):
        scores, _ = _scores(block, query, key, spec)
        total = scores.logsumexp(-1, keepdim=True)
        total = total.masked_fill_(total == -torch.inf, 0.0)
        weights = scores.sub_(total).exp_()
        block.of_rows(out)[...] = block.unfold(block.fold(weights) @ block.of_keys(value))
        block.of_rows(lse)[...] = total[..., 0]
    return out, lse


def grad_query(
    grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, spec: ScoreSpec
) -> Tensor:
    """dq over all of ``key`` and ``value``. ``delta`` [B, H, k]: the sum over features of ``grad`` times the output."""
    result = rows_like(query, query.shape[-1])
    for block in _blocks(query, key, spec):
        _, grad_scores = _backward(block, grad, delta, lse, query, key, value, spec)
        block.of_rows(result)[...] = block.unfold(block.fold(grad_scores) @ block.of_keys(key))
    return result


def grad_keys(
    grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, spec: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """dk and dv of ``key`` and ``value``."""
    grad_key, grad_value = (torch.zeros_like(rows_like(t, t.shape[-1]), dtype=lse.dtype) for t in (key, value))
    for block in _blocks(query, key, spec):
        weights, grad_scores = _backward(block, grad, delta, lse, query, key, value, spec)
        block.add(grad_value, block.fold(weights).mT @ block.folded(grad))
        block.add(grad_key, block.fold(grad_scores).mT @ block.folded(query))
    return grad_key.to(key.dtype), grad_value.to(value.dtype)


def grad_every(
    grad: Tensor, out: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, spec: ScoreSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv over all keys; the scores are computed once."""
    if _takes_flash_backward(query, key, value, spec) and (start := spec.start) is not None:
        return _grad_consecutive(grad, out, lse, query, key, value, start, spec.scale)
    result = rows_like(query, query.shape[-1])
    grad_key, grad_value = (torch.zeros_like(rows_like(t, t.shape[-1]), dtype=lse.dtype) for t in (key, value))
    for block in _blocks(query, key, spec):
        weights, grad_scores = _backward(block, grad, delta, lse, query, key, value, spec)
        grad_scores = block.fold(grad_scores)
        block.of_rows(result)[...] = block.unfold(grad_scores @ block.of_keys(key))
        block.add(grad_value, block.fold(weights).mT @ block.folded(grad))
        block.add(grad_key, grad_scores.mT @ block.folded(query))
    return result, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _takes_flash_backward(query: Tensor, key: Tensor, value: Tensor, spec: ScoreSpec) -> bool:
    """Whether PyTorch's flash attention for CPU has a backward for these operands."""
    grouped = query.shape[1] != key.shape[1]
    plain = not spec.softcap and spec.weight is None and query.shape[-1] == value.shape[-1]
    return query.is_cpu and query.dtype is torch.float32 and plain and (_FLASH_BACKWARD_GROUPS or not grouped)


def _grad_consecutive(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of consecutive rows from ``start``, in the two parts of ``_forward_consecutive``."""
    flash = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, scale=scale)
    grad, out, query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, out, query, key, value))
    own, earlier = slice(start, start + query.shape[2]), slice(start)
    grad_key, grad_value = (torch.zeros_like(rows_like(t, t.shape[-1])) for t in (key, value))
    result, grad_key[:, :, own], grad_value[:, :, own] = flash(
        grad, query, key[:, :, own], value[:, :, own], out, lse, 0.0, True
    )
    if start:
        more, grad_key[:, :, earlier], grad_value[:, :, earlier] = flash(
            grad, query, key[:, :, earlier], value[:, :, earlier], out, lse, 0.0, False
        )
        result = result + more
    return rows_like(query, query.shape[-1]).copy_(result), grad_key, grad_value


def grad_selected(
    grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, columns: Tensor,
    spec: ScoreSpec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv of the keys at ``columns`` [B, m]. ``spec``: that of all keys."""
    key, value = (t.gather(2, columns[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in (key, value))
    return grad_keys(grad, delta, lse, query, key, value, spec.at(columns))


def _scores(block: Block, query: Tensor, key: Tensor, spec: ScoreSpec) -> tuple[Tensor, Tensor | None]:
    """The scores of a block [b, H, r, n]; with a softcap also tanh(scores / softcap)."""
    scores = block.unfold(block.folded(query).mul(spec.scale) @ block.of_keys(key).mT)
    capped = scores.div_(spec.softcap).tanh_() if spec.softcap else None
    scores = scores if capped is None else capped * spec.softcap
    return scores if block.bias is None else scores.add_(block.bias), capped


def _backward(
    block: Block, grad: Tensor, delta: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, spec: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """The attention weights p of a block, and the gradient of its scores: p (dp - delta) scale, dp = grad v^T."""
    scores, capped = _scores(block, query, key, spec)
    weights = scores.sub_(block.of_rows(lse)[..., None]).exp_() if spec.weight is None else scores.fill_(spec.weight)
    grad_scores = block.unfold(block.folded(grad) @ block.of_keys(value).mT)
    grad_scores = grad_scores.sub_(block.of_rows(delta)[..., None]).mul_(weights).mul_(spec.scale)
    return weights, grad_scores if capped is None else grad_scores.mul_(1 - capped * capped)
