"""A slow, independent computation of TokenSeek's scores and selections, in eager PyTorch and plain Python.

Nothing here uses ``tokenseek_fx``. Attention weights are whole ``[B, H, T, T]`` tensors, gradients come from
``torch.autograd.grad``, and a selection is a sorted list.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# ---- scores


@dataclass(frozen=True)
class Signals:
    """The signals of an eager model for its tokens, all [B, T], with the full loss.

    ``attention``: I1[b, j] = sum over heads h and queries i of A[b, h, i, j], summed over the layers asked for.
    ``gradient``: I2[b, j] = sum over the hidden dim of |dL/dz[b, j]|. ``loss``: the loss term of token j, 0 without a
    label. ``labelled``: it has a label. ``attended``: some query sees it. ``total``: L itself.
    """

    attention: Tensor
    gradient: Tensor
    loss: Tensor
    labelled: Tensor
    attended: Tensor
    total: Tensor


def signals(
    model: nn.Module,
    batch: dict[str, Any],
    blocks: Sequence[nn.Module],
    head: nn.Module,
    attention_layers: str | Sequence[int] = "last",
    gradient_of: str = "last_block",
) -> Signals:
    """Run ``model(**batch)`` once; ``blocks`` (of one attention each) and ``head`` are submodules of ``model``."""
    z_of = blocks[-1] if gradient_of == "last_block" else head
    paths = {module: name for name, module in model.named_modules()}
    model = copy.deepcopy(model).requires_grad_(False)
    seen = Watch()
    handle = model.get_submodule(paths[z_of]).register_forward_pre_hook(seen.catch, with_kwargs=True)
    with seen:
        output = model(**batch)
    handle.remove()
    total = output.loss if hasattr(output, "loss") else output
    gradient = torch.autograd.grad(total, seen.z)[0].abs().sum(-1)
    (loss,), (labelled,) = seen.losses, seen.labelled
    short = gradient.shape[1] - loss.numel() // gradient.shape[0]  # for a model that drops its last logits
    loss, labelled = (F.pad(x.view(len(gradient), -1), (0, short)) for x in (loss, labelled))
    assert len(seen.maps) == len(blocks)
    named = {"last": [-1], "first": [0], "all": range(len(blocks))}
    chosen = named[attention_layers] if isinstance(attention_layers, str) else attention_layers
    tokens = gradient.shape[1]  # attention weights may have a column for sinks
    attention = sum(seen.maps[layer].sum((1, 2))[:, :tokens] for layer in chosen)
    return Signals(attention.detach(), gradient, loss.detach(), labelled, attention.detach() > 0, total.detach())


class Watch(TorchFunctionMode):
    """Records all attention weights and every loss over tokens of an eager model."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.losses, self.labelled = [], [], []

    def catch(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook: the first argument becomes the leaf z."""
        name, x = (None, args[0]) if args else next(iter(kwargs.items()))
        self.z = x.detach().requires_grad_()
        return ((self.z, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: self.z})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.maps.append(attention_map(*args, **kwargs))
            torch.testing.assert_close(self.maps[-1] @ _repeated(args[2], args[0]), out, rtol=1e-6, atol=1e-6)
        elif func in (F.softmax, torch.softmax, Tensor.softmax) and out.ndim == 4:
            self.maps.append(torch.where(_all_masked(args[0]), 0, out))
        elif func is F.cross_entropy and kwargs.get("reduction") != "none":
            self._note_loss(*args, **kwargs)
        return out

    def _note_loss(self, input: Tensor, target: Tensor, **kwargs: Any) -> None:
        self.losses.append(F.cross_entropy(input, target, **{**kwargs, "reduction": "none"}))
        self.labelled.append(target != kwargs.get("ignore_index", -100))


def attention_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights [B, H, T, T] of ``scaled_dot_product_attention`` with these arguments; 0 in fully masked rows."""
    scores = q @ _repeated(k, q).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.where(_all_masked(scores), 0, scores.softmax(-1))


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _all_masked(scores: Tensor) -> Tensor:
    """bool [.., 1]: rows fully masked, by -inf or by the smallest number of the dtype (as in transformers' masks)."""
    lowest = torch.finfo(scores.dtype).min
    return scores.amax(-1, keepdim=True) <= max(lowest / 2, torch.finfo(torch.float32).min / 2)


def minmax(x: Tensor) -> Tensor:
    """(x - min) / (max - min) in every row, 0 where all are equal."""
    rows = []
    for row in x:
        low, high = row.min(), row.max()
        rows.append((row - low) / (high - low) if high > low else torch.zeros_like(row))
    return torch.stack(rows)


def tokenseek(found: Signals, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha log(I1) + beta minmax(I2); a term with coefficient 0 is left out, and padding is -inf."""
    score = torch.zeros_like(found.attention)
    if alpha:
        score = score + alpha * found.attention.log()
    if beta:
        score = score + beta * minmax(found.gradient)
    return score.masked_fill(~found.attended, -torch.inf)


# ---- selections: one instance at a time, numbers in lists


@dataclass(frozen=True)
class Rules:
    """What decides between the tokens of one instance, besides their keys."""

    kept: int
    labelled: list[bool] | None = None
    attended: list[bool] | None = None
    pinned: list[bool] = field(default_factory=list)
    labelled_first: float = 0.0
    keep_label: bool = True
    noise: Sequence[float] | None = None

    def padding(self, i: int) -> bool:
        return self.attended is not None and not self.attended[i]

    def has_label(self, i: int) -> bool:
        return self.labelled is None or self.labelled[i]

    def choose(self, keys: Sequence[float]) -> list[int]:
        """The kept positions: pinned ones, then the best labelled ones up to the share, then the best of all.

        Of equal keys, those with the largest noise; without noise, the first ones.
        """
        noise = self.noise or [-i for i in range(len(keys))]
        place = lambda i: (self.padding(i), math.inf if self.padding(i) else -keys[i], -noise[i])  # noqa: E731
        best = sorted(range(len(keys)), key=place)
        chosen = [i for i in best if self.pinned and self.pinned[i]][: self.kept]
        if self.labelled is not None:
            reserved = max(ceil_share(self.labelled_first, self.kept) - len(chosen), int(self.keep_label))
            reserved = min(reserved, self.kept - len(chosen))
            labelled = [i for i in best if self.labelled[i] and not self.padding(i) and i not in chosen]
            chosen += labelled[:reserved]
        chosen += [i for i in best if i not in chosen][: self.kept - len(chosen)]
        return sorted(chosen)


def ceil_share(ratio: float, total: int) -> int:
    """ceil(ratio * total), exact for the decimal as written: 0.07 of 100 is 7.

    >>> ceil_share(0.1, 1024), ceil_share(0.07, 100), ceil_share(0, 5)
    (103, 7, 0)
    """
    return math.ceil(Fraction(repr(ratio)) * total)


def log_chances(scores: Sequence[float], rules: Rules, mix: float) -> list[float]:
    """log((1 - mix) softmax(score) + mix uniform over the labelled, or over the attended where there is no label)."""
    attended = [i for i in range(len(scores)) if not rules.padding(i)]
    fair = [i for i in attended if rules.has_label(i)] or attended
    largest = max(scores[i] for i in attended)
    exps = [math.exp(scores[i] - largest) if i in attended else 0.0 for i in range(len(scores))]
    return [_log((1 - mix) * e / sum(exps) + mix * (i in fair) / len(fair)) for i, e in enumerate(exps)]


def draw_keys(logp: Sequence[float], noise: Sequence[float]) -> list[float]:
    """log p + Gumbel noise of uniform noise."""
    return [p - _log(-_log(u)) for p, u in zip(logp, noise, strict=True)]


def threshold(i: int, keys: Sequence[float], rules: Rules) -> float:
    """kappa: the key below which token i would not be chosen, with all other keys fixed; -inf if it always would be.

    The choice can only change where key i passes another key, so it is tried just below each of these.
    """

    def kept_at(key: float) -> bool:
        return i in rules.choose([*keys[:i], key, *keys[i + 1 :]])

    others = sorted({key for j, key in enumerate(keys) if j != i and key > -math.inf})
    below = [first - 1 for first in others[:1]] + [(a + b) / 2 for a, b in pairwise(others)]
    return max((edge for edge, key in zip(others, below, strict=True) if not kept_at(key)), default=-math.inf)


def weight(i: int, logp: Sequence[float], keys: Sequence[float], rules: Rules, clip: float = math.inf) -> float:
    """1 / pi of a chosen token, clipped: pi = P(log p + Gumbel > kappa) = 1 - exp(-exp(log p - kappa))."""
    kappa = threshold(i, keys, rules)
    if (rules.pinned and rules.pinned[i]) or not rules.has_label(i) or kappa == -math.inf:
        return 1.0
    return min(-1 / math.expm1(-math.exp(logp[i] - kappa)), clip)


def sample(
    scores: Sequence[float], noise: Sequence[float], rules: Rules, mix: float, clip: float = math.inf
) -> tuple[list[int], list[float]]:
    """The drawn positions and their weights."""
    logp = log_chances(scores, rules, mix)
    keys = draw_keys(logp, noise)
    chosen = rules.choose(keys)
    return chosen, [weight(i, logp, keys, rules, clip) for i in chosen]


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
