"""Random transformers: every model is trained exactly, or refused with a reason.

A recipe is drawn from a seed: moves and mixing of keys, values, queries and the stream, prefix tokens, losses, layouts,
sizes that change. Loss and gradients of its model are compared with those of the eager reference.

    python tests/random_models.py --count 2000    # how many are exact, and refused for which reason
    python tests/random_models.py --seed 7        # one recipe and its outcome
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from compare import TOPK, Run, error, executed, grads_of, loss_of

import tokenseek_fx
from tokenseek_fx import reference
from tokenseek_fx.passes.graph.errors import InvariantBroken, TokenSeekError

V, HEADS, HEAD_DIM, CHANNELS = 29, 2, 8, 6
D = HEADS * HEAD_DIM
#: Lengths as (rows, columns) of an image; they equal no other size.
LENGTHS = ((4, 5), (3, 7), (5, 5), (3, 9), (2, 11))
BATCHES = (5, 7)

# -- transforms [N, T, D] -> [N, T, D]: moves and mixing, in several spellings -----------------------------------------

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "pad and slice": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "slice and pad": lambda x: F.pad(x[:, 2:], (0, 0, 0, 2)),
    "negative pad": lambda x: F.pad(x, (0, 0, 1, -1)),
    "concatenated zeros": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
    "first repeated": lambda x: torch.cat([x[:, :1], x[:, :-1]], 1),
    "written": lambda x: _written(torch.zeros_like(x), x[:, :-1], 1),
    "written over": lambda x: _written(x.clone(), x[:, :-2], 2),
    "roll": lambda x: x.roll(1, 1),
    "roll of slices": lambda x: torch.cat([x[:, -3:], x[:, :-3]], 1),
    "flip": lambda x: x.flip(1),
    "index_select": lambda x: x.index_select(1, torch.arange(x.shape[1]).roll(2)),
    "index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "pairs of indices": lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1]).roll(-1)[None]],
    "gather": lambda x: x.gather(1, torch.arange(x.shape[1]).roll(1)[None, :, None].expand(x.shape)),
    "even, then odd": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "halves swapped": lambda x: torch.cat(x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)[::-1], 1),
    "stacked rows": lambda x: torch.stack(x.unbind(1)[::-1], 1),
}


def _written(y: Tensor, x: Tensor, first: int) -> Tensor:
    y[:, first:] = x
    return y


def _mean_before(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() / x.shape[1]


MIXING: dict[str, Callable[[nn.Conv1d, Tensor], Tensor]] = {
    "conv, same": lambda c, x: F.conv1d(x.mT, c.weight, c.bias, padding=1).mT,
    "conv, padded before": lambda c, x: F.conv1d(F.pad(x.mT, (2, 0)), c.weight, c.bias).mT,
    "conv, padded and sliced": lambda c, x: F.conv1d(x.mT, c.weight, c.bias, padding=2)[..., : x.shape[1]].mT,
    "conv, valid, padded after": lambda c, x: F.pad(F.conv1d(x.mT, c.weight, c.bias), (1, 1)).mT,
    "conv, strided, upsampled": lambda c, x: (
        F.interpolate(F.conv1d(x.mT, c.weight, c.bias, stride=2, padding=1), size=x.shape[1]).mT
    ),
    "transposed conv": lambda c, x: F.conv_transpose1d(x.mT, c.weight, c.bias)[..., : x.shape[1]].mT,
    "depthwise taps": lambda c, x: sum(
        F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] * c.weight[:, 0, i] for i in range(c.weight.shape[2])
    ),
    "shift mixed in": lambda c, x: x + F.pad(x, (0, 0, 1, 0))[:, :-1] * c.bias,
    "cumsum": lambda c, x: x.cumsum(1) * c.bias,
    "matrix, einsum": lambda c, x: torch.einsum("st,ntd->nsd", _mean_before(x), x),
    "matrix, linear": lambda c, x: F.linear(x.mT, _mean_before(x)).mT,
    "matrix, product": lambda c, x: _mean_before(x) @ x,
    "pooling, upsampled": lambda c, x: F.interpolate(F.avg_pool1d(x.mT, 2, ceil_mode=True), size=x.shape[1]).mT,
    "max pooling": lambda c, x: F.max_pool1d(x.mT, 3, 1, 1).mT,
    "pooled by reshape": lambda c, x: (
        x - x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2).repeat_interleave(3, 1)[:, : x.shape[1]]
    ),
    "sort": lambda c, x: x.sort(1).values,
    "softmax over tokens": lambda c, x: x.softmax(1) * 9,
    "mean subtracted": lambda c, x: x - x.mean(1, keepdim=True),
    "delta rule": lambda c, x: torch.linalg.solve_triangular(
        torch.eye(x.shape[1]).double() + (x @ x.mT).tril(-1) / 9, x * c.bias, upper=False, unitriangular=True
    ),
    "linear attention": lambda c, x: (x @ x.mT).tril() @ (x * c.bias),
}


class Transform(nn.Module):
    """A move or mixing operation [N, T, D], and how its result meets its input."""

    def __init__(self, name: str, joined: str, width: int) -> None:
        super().__init__()
        self.name, self.joined = name, joined
        self.conv = nn.Conv1d(width, width, 3)
        self.both = nn.Linear(2 * width, width) if joined == "features" else None

    def forward(self, x: Tensor) -> Tensor:
        y = MOVES[self.name](x) if self.name in MOVES else MIXING[self.name](self.conv, x)
        if self.joined == "sum":
            return x + y
        if self.joined == "gate":
            return x * y.sigmoid()
        return y if self.both is None else self.both(torch.cat([x, y], -1))


# -- the model ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, self.qkv, self.out = c, nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.transforms = nn.ModuleDict(
            {
                part: Transform(*how, HEAD_DIM if c["in_heads"] and part != "x" else D)
                for part, how in c["transforms"].items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip("qkv", self.qkv(x).chunk(3, -1), strict=True))
        for part, transform in self.transforms.items():
            if part == "x":
                continue
            parts[part] = self._in_heads(parts[part], transform) if self.c["in_heads"] else transform(parts[part])
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in parts.values())
        return self.out(self._mix(q, k, v).transpose(1, 2).flatten(2))

    def _in_heads(self, x: Tensor, transform: Transform) -> Tensor:
        heads = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2).flatten(0, 1)
        return transform(heads).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal, form = self.c["causal"], self.c["attention"]
        if form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if causal else None
        if form == "folded":
            q, k, v = (z.flatten(0, 1) for z in (q, k, v))
        scores = q @ k.mT / HEAD_DIM**0.5
        y = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
        return y.unflatten(0, (-1, HEADS)) if form == "folded" else y


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, self.attention = c, Attention(c)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [B, T, D], or [T, B, D]."""
        swap = (lambda y: y.transpose(0, 1)) if self.c["layout"] == "time first" else lambda y: y
        y = swap(self.norm1(x))
        if "x" in self.attention.transforms:
            y = self.attention.transforms["x"](y)
        x = x + swap(self.attention(y))
        if self.c["layout"] == "flat":
            flat = x.reshape(-1, D)
            return (flat + self.mlp(self.norm2(flat))).view(x.shape)
        return x + self.mlp(self.norm2(x))


#: Tokens put before the others, [N, P, D]. Their number differs from that of any padding, so sizes tell them apart.
#: No two are equal: a sort has no derivative at ties.
PREFIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat": lambda p, x: torch.cat([p.expand(x.shape[0], -1, -1), x], 1),
    "repeat": lambda p, x: torch.cat((p.repeat(x.shape[0], 1, 1), x), dim=1),
    "written": lambda p, x: _written(F.pad(p, (0, 0, 0, x.shape[1])).repeat(x.shape[0], 1, 1), x, p.shape[1]),
}
#: The last n of T positions.
DROPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slice": lambda x, first: x[:, first:],
    "negative slice": lambda x, first: x[:, first - x.shape[1] :],
    "narrow": lambda x, first: x.narrow(1, first, x.shape[1] - first),
    "split": lambda x, first: x.split([first, x.shape[1] - first], 1)[1],
    "index_select": lambda x, first: x.index_select(1, torch.arange(first, x.shape[1])),
    "index": lambda x, first: x[:, torch.arange(first, x.shape[1])],
    "unbind": lambda x, first: torch.stack(x.unbind(1)[first:], 1),
}
#: Tokens that reach the loss; applied to its labels as well.
TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x,
    "even": lambda x: x[:, ::2],
    "third": lambda x: x[:, 1::3],
    "last": lambda x: x[:, -6:],
    "middle": lambda x: x[:, 1:-1],
    "flipped": lambda x: x.flip(1),
    "rolled": lambda x: x.roll(1, 1),
    "halves": lambda x: torch.cat([x[:, 4:], x[:, :2]], 1),
}


class Transformer(nn.Module):
    """A transformer by a recipe; the inputs are those of ``batch_of``."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(c["seed"])
        self.c, self.grid = c, c["grid"]
        self.embed = nn.Embedding(V, D) if c["inputs"] == "ids" else nn.Linear(CHANNELS, D)
        self.positions = nn.Parameter(torch.randn(64, D)) if c["positions"] == "table" else nn.Embedding(64, D)
        self.prefix = nn.Parameter(torch.randn(1, c["prefix_tokens"], D))
        self.layers = nn.ModuleList(Layer({**c, "transforms": t}) for t in c["layers"])
        self.body = nn.Linear(D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, self._classes())
        self.double()

    def _classes(self) -> int:
        return {"image": 3 * 2 * 2}.get(self.c["tail"], V)

    def forward(self, x: Tensor, y: Tensor, x2: Tensor | None = None) -> Tensor:
        c = self.c
        if x2 is not None:
            x = torch.cat([x, x2])
        x = self.stream(x)
        if x2 is not None:
            first, second = x.chunk(2) if c["sides"] == "chunk" else x.unflatten(0, (2, -1)).unbind(0)
            x = first * second if c["paired"] else first - second.mean(1, keepdim=True)
        if c["tail"] in ("first", "mean"):
            x = x[:, 0] if c["tail"] == "first" else x.mean(1)
        elif c["tail"] == "image":
            return self._image_loss(self.head(self.norm(x)), y)
        else:
            cut = TAILS[c["tail"]]
            x, y = (cut(x), cut(y)) if c["cut_before_head"] else (x, y)
            if c["body"]:
                x = self.body(x).relu()
            if not c["cut_before_head"]:
                return self.loss(cut(self.head(self.norm(x))), cut(y))
        return self.loss(self.head(self.norm(x)), y)

    def stream(self, x: Tensor) -> Tensor:
        """The last hidden states [N, T, D] of the tokens, or of the prefix and the tokens."""
        c = self.c
        x = self.embed(x)
        length = x.shape[1]
        at = self.positions[:length] if c["positions"] == "table" else self.positions(torch.arange(length))
        x = x + at
        swap = (lambda z: z.transpose(0, 1)) if c["layout"] == "time first" else (lambda z: z)
        for number, layer in enumerate(self.layers):
            if number == c["prefix_before"]:
                x = PREFIXES[c["prefix"]](self.prefix, x)
            x = swap(layer(swap(x)))
            if number == c["drop_after"]:
                x = DROPS[c["drop"]](x, c["prefix_tokens"])
        return x

    def _image_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Patches [B, h*w, 3*2*2] laid out as an image [B, 3, 2h, 2w]."""
        h, w = self.grid
        x, y = (z.view(-1, h, w, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 2 * h, 2 * w) for z in (x, y))
        return ELEMENTWISE[self.c["elementwise"]](x, y, reduction=self.c["reduction"])

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        c, how = self.c, {"reduction": self.c["reduction"]}
        if c["loss"] == "elementwise":
            return ELEMENTWISE[c["elementwise"]](logits, y, **how)
        if c["loss"] == "soft labels":
            return F.cross_entropy(logits.flatten(0, -2), y.softmax(-1).flatten(0, -2), **how)
        if c["shifted"] and logits.ndim == 3:
            logits, y = logits[:, :-1], y[:, 1:]
        if c["loss"] == "class weights":
            how["weight"] = torch.linspace(0.5, 2, V, dtype=torch.float64)
        if c["loss"] == "label smoothing":
            how["label_smoothing"] = 0.1
        if c["loss"] == "none reduced":
            return (F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none") * 0.1).sum()
        if c["classes_second"] and logits.ndim == 3:
            return F.cross_entropy(logits.mT, y, **how)
        return F.cross_entropy(logits.reshape(-1, V), y.reshape(-1), **how)


ELEMENTWISE = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "bce": lambda x, y, **how: F.binary_cross_entropy_with_logits(x, y.sigmoid(), **how),
}


# -- recipes and batches -----------------------------------------------------------------------------------------------


def recipe(seed: int) -> dict[str, Any]:
    """What a model is made of, drawn from a seed."""
    draw = random.Random(seed)
    often = lambda p: draw.random() < p  # noqa: E731
    depth = draw.choice([1, 2, 2])
    prefix_before = draw.choice([None, None, 0, 0, depth - 1])
    layers = [_transforms(draw) for _ in range(depth)]
    loss = draw.choice(["labels", "labels", "class weights", "label smoothing", "none reduced", "soft labels"])
    tail = draw.choice([*TAILS, "all", "all", "first", "mean", "image"])
    sides = draw.choice([None] * 9 + ["chunk", "unbind"])
    return {
        "seed": seed,
        "grid": draw.choice(LENGTHS),
        "batch": draw.choice(BATCHES),
        "inputs": draw.choice(["ids", "features"]),
        "positions": draw.choice(["table", "embedding"]),
        "layout": draw.choice(["batch first", "batch first", "time first", "flat"]),
        "attention": draw.choice(["sdpa", "eager", "folded"]),
        "causal": often(0.5),
        "in_heads": often(0.25),
        "layers": layers,
        "prefix": draw.choice(sorted(PREFIXES)),
        "prefix_tokens": draw.choice([3, 6]),
        "prefix_before": prefix_before,
        "drop": draw.choice(sorted(DROPS)),
        "drop_after": depth - 1 if prefix_before is not None and (tail == "image" or sides or often(0.6)) else None,
        "sides": sides,
        "paired": often(0.5),
        "tail": tail,
        "body": often(0.5),
        "cut_before_head": often(0.6),
        "loss": "elementwise" if tail == "image" or often(0.35) else loss,
        "elementwise": draw.choice(sorted(ELEMENTWISE)),
        "reduction": draw.choice(["mean", "mean", "sum"]),
        "shifted": often(0.25),
        "classes_second": often(0.3),
        "labelled": draw.choice([0.7, 0.7, 0.7, 0.1, 0.0]),
        "other_sizes": often(0.1),
        "options": {
            "scorer": draw.choice(["random", "strided", "first", "last"]),
            "keep_ratio": draw.choice([0.15, 0.3, 0.5]),
            "select": draw.choice(["topk", "topk", "sample"]),
        },
    }


def _transforms(draw: random.Random) -> dict[str, tuple[str, str]]:
    """For some of the queries, keys, values and the input ``x`` of a block: a transform, and how it is joined."""
    parts = draw.sample("qkvx", draw.choice([0, 1, 1, 2]))
    names = sorted(MOVES if draw.random() < 0.5 else MIXING)
    return {part: (draw.choice(names), draw.choice(["alone", "sum", "gate", "features"])) for part in parts}


def batch_of(c: dict[str, Any], batch: int | None = None, length: int | None = None) -> dict[str, Tensor]:
    """Inputs and labels of a model; ``batch`` and ``length`` replace those of the recipe."""
    torch.manual_seed(c["seed"] + 1)
    b, t = batch or c["batch"], length or c["grid"][0] * c["grid"][1]
    inputs = {"x": _inputs(c, b, t)}
    if c["sides"]:
        inputs["x2"] = _inputs(c, b, t)
    kept = t + c["prefix_tokens"] * (c["prefix_before"] is not None and c["drop_after"] is None)
    shape = (b,) if c["tail"] in ("first", "mean") else (b, kept)
    if c["loss"] in ("elementwise", "soft labels"):
        return inputs | {"y": torch.randn(*shape, 12 if c["tail"] == "image" else V).double()}
    labels = torch.randint(V, shape)
    return inputs | {"y": labels if len(shape) == 1 else labels.masked_fill(torch.rand(shape) > c["labelled"], -100)}


def _inputs(c: dict[str, Any], b: int, t: int) -> Tensor:
    return torch.randint(V, (b, t)) if c["inputs"] == "ids" else torch.randn(b, t, CHANNELS).double()


# -- outcomes ----------------------------------------------------------------------------------------------------------

#: How a refused model is told apart from one that is trained otherwise than the definition says.
KINDS = ("exact", "refused", "unchecked", "different")


@dataclass(frozen=True)
class Outcome:
    """``kind``: one of ``KINDS`` (unchecked: the reference finds its shapes ambiguous); ``reason`` without numbers."""

    kind: str
    reason: str = ""


def outcome(c: dict[str, Any], **options: Any) -> Outcome:
    """Train a step of the model of a recipe, and compare it with the reference; the first that is not exact.

    A recipe with ``other_sizes`` is compiled and trains a second step, with another batch size and length.
    """
    model, batches = Transformer(c), [batch_of(c)]
    if c["other_sizes"]:
        batches.append(batch_of(c, c["batch"] + 2, None if c["tail"] == "image" else 24))
    options = {"report_loss": "kept", **TOPK, **c["options"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiles = len(batches) > 1 or "inner" in options
            runs = steps(model, batches, options) if compiles else [executed(model, batches[0], **options)]
        except Exception as caught:
            return _refused(caught)
        found = [_compared(model, *pair, options) for pair in zip(batches, runs, strict=True)]
    return next((step for step in found if step.kind != "exact"), found[0])


def steps(model: nn.Module, batches: list[dict[str, Tensor]], options: dict[str, Any]) -> list[Run]:
    """A step for each batch, by one compiled model."""
    torch._dynamo.reset()
    twin, runs = copy.deepcopy(model), []
    compiled = torch.compile(twin, backend="tokenseek", options={"inner": "eager", "strict": True, **options})
    for batch in batches:
        twin.zero_grad()
        with tokenseek_fx.record() as recording:
            output = compiled(**batch)
        loss_of(output).backward()
        runs.append(Run(output, grads_of(twin), recording[0].indices, recording[0]))
    return runs


def _compared(model: nn.Module, batch: dict[str, Tensor], run: Run, options: dict[str, Any]) -> Outcome:
    chosen, twin = run.selection, copy.deepcopy(model)
    assert chosen is not None
    others = {s.scores.shape[1]: s.indices for s in chosen.others}
    if len(others) < len(chosen.others):
        return Outcome("unchecked", "Two token axes have the same length.")
    try:
        with reference.ditching(twin, chosen.indices, chosen.scores.shape[1], chosen.weights, (), others):
            loss = loss_of(twin(**batch))
            loss.backward()
    except ValueError as caught:
        return Outcome("unchecked", _without_numbers(str(caught)))
    expected = grads_of(twin)
    zero = {name: torch.zeros_like(g) for name, g in run.grads.items()}  # a parameter that the reference doesn't reach
    off = error({**zero, **run.grads}, {**zero, **expected})
    of_loss = (run.loss.detach() - loss.detach()).abs().item() / max(1.0, loss.abs().item())
    if max(off, of_loss) > (1e-6 if options.get("inner") == "inductor" else 1e-9):
        return Outcome("different", f"gradients {off:.1e}, loss {of_loss:.1e}")
    return Outcome("exact")


def _refused(caught: BaseException) -> Outcome:
    cause: BaseException | None = caught
    while cause is not None and not isinstance(cause, TokenSeekError):
        cause = cause.__cause__ or cause.__context__ or getattr(cause, "inner_exception", None)
    if cause is None or isinstance(cause, InvariantBroken) or "internal error" in str(cause):
        return Outcome("different", f"{type(caught).__name__}: {str(caught)[:300]}")
    return Outcome("refused", _without_numbers(str(cause.args[0])))


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="print one recipe and its outcome")
    given = parser.parse_args()
    if given.seed is not None:
        print(json.dumps(recipe(given.seed), indent=1))
        print(outcome(recipe(given.seed)))
        return
    counts = collections.Counter[tuple[str, str]]()
    for seed in range(given.first, given.first + given.count):
        found = outcome(recipe(seed))
        if found.kind == "different":
            print(f"DIFFERENT: --seed {seed}: {found.reason}", flush=True)
        counts[found.kind, found.reason if found.kind != "different" else ""] += 1
    print(f"Seeds {given.first} to {given.first + given.count - 1}, PyTorch {torch.__version__}")
    for kind in KINDS:
        reasons = {reason: count for (k, reason), count in counts.items() if k == kind}
        print(f"{sum(reasons.values()):5} {kind}")
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            if reason:
                print(f"      {count:5} {reason}")


if __name__ == "__main__":
    main()
