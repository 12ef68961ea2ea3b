"""The small model of the golden graphs and of ``docs/how-it-works.md``, and its program after every pass."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tokenseek_fx.passes.graph.program import Program
from tokenseek_fx.passes.memory.audit import AuditSaved
from tokenseek_fx.passes.pipeline import Pass, Pipeline, training
from tokenseek_fx.passes.plan import Plan
from tokenseek_fx.passes.show import show
from tokenseek_fx.passes.streams.select import Select
from tokenseek_fx.scorers import last

VOCAB, WIDTH, HEADS, INNER, BATCH, TOKENS, KEPT = 11, 8, 2, 16, 2, 5, 3


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Model(nn.Module):
    """One block: causal attention, then an MLP, each with a norm before it and a residual add after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv, self.out, self.up, self.down, self.head = (
            nn.Linear(*sizes, bias=False)
            for sizes in [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH), (WIDTH, VOCAB)]
        )

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        b, t = ids.shape
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, -1))
        x = x + self.down(F.silu(self.up(self.norm2(x))))
        logits = self.head(x)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        return loss, logits


def pipeline() -> Pipeline:
    return training(Plan((Select(last(), keep_ratio=KEPT / TOKENS),), recompute="none")) + AuditSaved()


@functools.cache
def graphs() -> dict[str, str]:
    """The program after every pass that changes what is shown: pass name -> text."""
    found: dict[str, str] = {}

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        names = [_readable(node.name) for node in gm.graph.find_nodes(op="placeholder")]

        def look(step: Pass, program: Program) -> None:
            if step.name == "canonicalize":
                _name_inputs(program, names)
            text = show(program)
            if text not in found.values():  # passes that only decide don't change the text
                found[step.name] = text

        pipeline().run(Program(gm, tuple(inputs)), after=look)
        return gm

    ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % VOCAB
    torch.compile(Model(), backend=capture, dynamic=False)(ids, ids)
    return found


def _readable(name: str) -> str:
    """``l_self_modules_qkv_parameters_weight_`` -> ``qkv_weight``."""
    return re.sub(r"^l_|self_|modules_|parameters_|_$", "", name)


def _name_inputs(program: Program, names: Sequence[str]) -> None:
    for node, name in zip(program.placeholders, names, strict=True):
        node.name = node.target = name


if __name__ == "__main__":
    for name, text in graphs().items():
        print(f"-- {name}", text, "", sep="\n")
