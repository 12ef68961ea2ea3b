"""Add an analysis pass: a frozen value that writes one result, here how many attentions look at every token axis."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tokenseek_fx import Config
from tokenseek_fx.passes import Program, training
from tokenseek_fx.passes.analysis.token_axes import TokenAxes


@dataclass(frozen=True)
class AttentionCounts:
    """`by_axis`: for every token axis, first that of the loss, how many attentions have its tokens as keys."""

    by_axis: tuple[int, ...]


@dataclass(frozen=True)
class CountAttentions:
    """Count the attentions by the token axis of their keys. Reads `TokenAxes`; writes `AttentionCounts`."""

    name: str = "count attentions"

    def run(self, program: Program) -> Program:
        axes = program[TokenAxes]
        keys = [axes.keys_of(attention) for attention in axes.attentions]
        return program.with_(AttentionCounts(tuple(map(keys.count, axes.tokens))))

    def check(self, program: Program) -> None:
        assert sum(program[AttentionCounts].by_axis) <= len(program[TokenAxes].attentions)


def encoder_decoder(source: Tensor, target: Tensor) -> Tensor:
    source = source + F.scaled_dot_product_attention(source, source, source)
    target = target + F.scaled_dot_product_attention(target, target, target, is_causal=True)
    target = target + F.scaled_dot_product_attention(target, source, source)
    return target.square().sum()


def main() -> None:
    inputs = torch.randn(2, 9, 16, requires_grad=True), torch.randn(2, 7, 16, requires_grad=True)
    program = Program(make_fx(encoder_decoder, pre_dispatch=True)(*inputs), inputs)
    plan = Config(scorer="strided").plan()
    analysed = (training(plan).until("token axes") + CountAttentions()).run(program)  # after the passes that it reads
    trained = (training(plan) + CountAttentions()).run(program, until="count attentions")  # after all of them
    assert analysed[AttentionCounts] == trained[AttentionCounts] == AttentionCounts((1, 2))
    print(f"attentions with keys of the target, of the source: {analysed[AttentionCounts].by_axis}")


if __name__ == "__main__":
    main()
