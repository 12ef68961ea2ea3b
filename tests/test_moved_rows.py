"""Rows behind slices, moves and mixed tokens: every spelling has the gradient of the definition, written by hand.

One model has a branch with weights of its own for every spelling, so that it is captured once for each size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import compiled, error, executed, grads_of
from torch import Tensor, nn

D, NONE = 16, -1
SIZES = [(6, 11), (3, 8)]
Move = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Kept:
    """Cuts the gradient by hand; ``keep`` is bool [B, T], ``None``: all tokens."""

    def __init__(self, keep: Tensor | None) -> None:
        self.keep = keep

    def __call__(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """``x`` [B, n, ...] without gradient in rows whose token is not kept; ``tokens``: int64 [n]."""
        if self.keep is None:
            return x
        shown = self.of(x, tokens)
        return torch.where(shown.reshape(*shown.shape, *[1] * (x.ndim - 2)), x, x.detach())

    def of(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """bool [B, n]: rows of kept tokens or, where the number is -1, of no token."""
        shown = torch.cat([self.keep, torch.ones_like(self.keep[:, :1])], 1)
        return shown[:, torch.arange(x.shape[1]) if tokens is None else tokens]

    def mse(self, x: Tensor, tokens: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss over rows [B, n, C] against fixed values, of the kept rows."""
        target = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
        if self.keep is None:
            return F.mse_loss(x, target, reduction=reduction)
        shown = self.of(x, tokens).unsqueeze(-1).expand(x.shape)
        total = torch.where(shown, (x - target) ** 2, 0).sum()
        return total / shown.sum() if reduction == "mean" else total * (x.numel() / shown.sum().double())


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (2, D // 2)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Base(nn.Module):
    """An attention block, then a branch for each spelling."""

    def __init__(self, names: list[str], branch: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        self.embed, self.qkv, self.out = nn.Linear(6, D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.branches = nn.ModuleDict({name.replace(".", "_"): branch() for name in names})

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        cut = Kept(keep)
        h = cut(self.embed(x))
        q, k, v = cut(self.qkv(h)).chunk(3, -1)
        h = cut(h + self.out(cut(attended(q, k, v))))
        return self.losses(h, cut)

    def losses(self, h: Tensor, cut: Kept) -> Tensor:
        raise NotImplementedError


#: A move of the tokens of h [B, T, D], and its row numbers from those of the tokens.
MOVES: dict[str, Move] = {
    "slice": (lambda h: h[:, 2:], lambda t: t[2:]),
    "narrow": (lambda h: h.narrow(1, 2, h.shape[1] - 3), lambda t: t[2:-1]),
    "last": (lambda h: h[:, -3:], lambda t: t[-3:]),
    "strided": (lambda h: h[:, 1::3], lambda t: t[1::3]),
    "split": (lambda h: h.split([2, h.shape[1] - 2], 1)[1], lambda t: t[2:]),
    "chunk": (lambda h: h.chunk(2, 1)[1], lambda t: t.chunk(2)[1]),
    "unbind and stack": (lambda h: torch.stack(h.unbind(1)[2:], 1), lambda t: t[2:]),
    "two rows": (lambda h: torch.cat([h[:, 3:4], h[:, 5:6]], 1), lambda t: t[[3, 5]]),
    "index": (lambda h: h[:, torch.tensor([4, 1, 7, 7])], lambda t: t[[4, 1, 7, 7]]),
    "index_select": (lambda h: h.index_select(1, torch.tensor([4, 1, 7])), lambda t: t[[4, 1, 7]]),
    "index by instance": (
        lambda h: h[torch.arange(h.shape[0])[:, None], torch.tensor([[4, 1, 7]]).expand(h.shape[0], 3)],
        lambda t: t[[4, 1, 7]],
    ),
    "flip": (lambda h: h.flip(1), lambda t: t.flip(0)),
    "roll": (lambda h: h.roll(1, 1), lambda t: t.roll(1)),
    "roll by cat": (lambda h: torch.cat([h[:, -1:], h[:, :-1]], 1), lambda t: t.roll(1)),
    "shift by pad": (lambda h: F.pad(h, (0, 0, 1, 0))[:, :-1], lambda t: t - 1),
    "shift by cat": (lambda h: torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1), lambda t: t - 1),
    "prefix": (lambda h: torch.cat([torch.ones_like(h[:, :2]), h], 1), lambda t: F.pad(t, (2, 0), value=NONE)),
    "transposed": (lambda h: h.transpose(0, 1)[1:].transpose(0, 1), lambda t: t[1:]),
}


class Moved(Base):
    def losses(self, h: Tensor, cut: Kept) -> Tensor:
        total = torch.zeros((), dtype=h.dtype)
        for (move, number), branch in zip((MOVES[name] for name in self.names), self.branches.values(), strict=True):
            tokens = number(torch.arange(h.shape[1]))
            z = cut(F.gelu(cut(branch[0](move(h)), tokens)), tokens)
            total = total + cut.mse(cut(branch[1](z), tokens), tokens)
            total = total + cut.mse(branch[1](z), tokens, "sum")
        return total


def two_layers() -> nn.Module:
    return nn.ModuleList([nn.Linear(D, D), nn.Linear(D, 5)])


def convolution(h: Tensor, weight: Tensor, left: int, right: int) -> Tensor:
    """A convolution over tokens whose operand is padded first."""
    return F.conv1d(F.pad(h.mT, (left, right)), weight).mT


#: Operations that mix the tokens of h [B, T, D], with a weight [D, D, 4]; the result has T positions.
MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "convolution, padded first": lambda h, w: convolution(h, w, 3, 0),
    "convolution, padded inside": lambda h, w: F.conv1d(h.mT, w, padding=3)[..., : h.shape[1]].mT,
    "convolution, sliced late": lambda h, w: F.silu(F.conv1d(h.mT, w, padding=3)).mT[:, : h.shape[1]],
    "convolution, same": lambda h, w: F.conv1d(h.mT, w[..., :3], padding=1).mT,
    "convolution, as an image": lambda h, w: (
        F.conv2d(h.mT.unsqueeze(2), w[..., None, :3], padding=(0, 1)).squeeze(2).mT
    ),
    "matrix": lambda h, w: torch.ones(h.shape[1], h.shape[1], dtype=h.dtype).tril() @ h * w[0, :, 0],
    "cumulative sum": lambda h, w: h.cumsum(1) * w[0, :, 0],
    "sorted": lambda h, w: h.sort(1).values * w[0, :, 0],
    "pooled and repeated": lambda h, w: h + h.mean(1, keepdim=True) * w[0, :, 0],
    "shifted and added": lambda h, w: h * w[0, :, 0] + F.pad(h, (0, 0, 1, 0))[:, :-1],
}


class Mixed(Base):
    """Mixed tokens on the stream, and as queries, keys and values."""

    def losses(self, h: Tensor, cut: Kept) -> Tensor:
        total = torch.zeros((), dtype=h.dtype)
        for mix, branch in zip((MIXED[name] for name in self.names), self.branches.values(), strict=True):
            weights = [layer.weight.unflatten(0, (D, 4)).transpose(1, 2) for layer in list(branch)[:4]]
            stream, q, k, v = (cut(mix(h, weight)) for weight in weights)
            total = total + cut.mse(cut(branch[4](stream))) + cut.mse(cut(branch[4](cut(attended(q, k, v)))))
        return total


def five_layers() -> nn.Module:
    return nn.ModuleList([*(nn.Linear(D, 4 * D, bias=False) for _ in range(4)), nn.Linear(D, 5)])


MODELS = {"moved": (Moved, MOVES, two_layers), "mixed": (Mixed, MIXED, five_layers)}


def check(model: nn.Module, batch: dict[str, Tensor], run, tol: float = 1e-10) -> None:
    """Every gradient of a step equals the one by hand."""
    keep = torch.zeros(batch["x"].shape[:2], dtype=torch.bool).scatter(1, run.indices, True)
    by_hand = copy.deepcopy(model)
    by_hand(**batch, keep=keep).backward()
    expected = grads_of(by_hand)
    for name, grad in expected.items():
        torch.testing.assert_close(run.grads[name], grad, rtol=tol, atol=tol * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_every_spelling_has_the_gradient_of_the_definition(kind):
    form, spellings, branch = MODELS[kind]
    model = form(list(spellings), branch).double()
    for batch, length in SIZES:
        x = torch.randn(batch, length, 6, dtype=torch.float64)
        check(model, {"x": x}, executed(model, {"x": x}, keep_ratio=0.4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_by_inductor(kind):
    """Every third spelling: those between are other ways to the same operations."""
    form, spellings, branch = MODELS[kind]
    model, x = form(list(spellings)[::3], branch).double(), torch.randn(4, 9, 6, dtype=torch.float64)
    check(model, {"x": x}, compiled(model, {"x": x}, inner="inductor", keep_ratio=0.4))


class Difference(Base):
    def losses(self, h: Tensor, cut: Kept) -> Tensor:
        return self.branches["0"][0](h[:, 1:] - h[:, :-1]).square().mean()


def test_rows_of_no_single_token_are_refused():
    with pytest.raises(Exception, match=r"rows of different tokens meet at aten.sub.Tensor"):
        executed(Difference(["0"], two_layers).double(), {"x": torch.randn(3, 8, 6, dtype=torch.float64)})


class TwoGrids(Base):
    def losses(self, h: Tensor, cut: Kept) -> Tensor:
        a, b = self.branches["0"]
        return a(h.unflatten(1, (4, 3))[:, 1:]).square().mean() + b(h.unflatten(1, (3, 4))[:, 1:]).square().mean()


def test_views_that_cut_across_each_other_are_refused():
    with pytest.raises(Exception, match=r"rows of different tokens meet at aten.view.default"):
        executed(TwoGrids(["0"], two_layers).double(), {"x": torch.randn(3, 12, 6, dtype=torch.float64)})


class Sides(Base):
    """Two sides joined along the batch, then apart: one side's tokens, and attention to the other side."""

    def losses(self, h: Tensor, cut: Kept) -> Tensor:
        half, first = h.shape[0] // 2, Kept(cut.keep if cut.keep is None else cut.keep[: h.shape[0] // 2])
        left, right = h.chunk(2)
        swapped, back = torch.cat([right, left]), Kept(cut.keep if cut.keep is None else cut.keep.roll(half, 0))
        a, b = self.branches["0"]
        other = attended(h, back(a(swapped)), back(a(swapped)))
        return first.mse(first(b(first(a(left))))) + cut.mse(cut(b(cut(other))))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return super().forward(torch.cat([x, x.flip(0) * 0.5]), keep)


class Merged(Base):
    """[B n, t] becomes [B, n t]; and the tokens are laid out as an image, every third position is taken."""

    def losses(self, h: Tensor, cut: Kept) -> Tensor:
        a, b = self.branches["0"]
        passages = Kept(cut.keep if cut.keep is None else cut.keep.reshape(h.shape[0] // 3, -1))
        third = torch.arange(h.shape[1])[1::3]
        y = cut(b(h))
        image = y.unflatten(1, (-1, 3)).movedim(-1, 1)
        kept = None if cut.keep is None else cut.keep.unflatten(1, (-1, 3)).unsqueeze(1).expand(image.shape)
        total = passages.mse(passages(b(passages(a(h.reshape(h.shape[0] // 3, -1, D))))))
        total = total + cut.mse(cut(b(cut(a(h.unflatten(1, (-1, 3))[:, :, 1]), third)), third), third)
        return total + (F.l1_loss(image, torch.zeros_like(image)) if kept is None else image[kept].abs().mean())


@pytest.mark.parametrize("form", [Sides, Merged])
def test_merged_and_joined_axes(form):
    model = form(["0"], two_layers).double()
    for batch, length in ((6, 12), (3, 9)):
        x = torch.randn(batch, length, 6, dtype=torch.float64)
        run = executed(model, {"x": x}, keep_ratio=0.4)
        keep = torch.zeros(run.selection.scores.shape, dtype=torch.bool).scatter(1, run.indices, True)
        by_hand = copy.deepcopy(model)
        by_hand(x, keep).backward()
        assert error(run.grads, grads_of(by_hand)) < 1e-10
