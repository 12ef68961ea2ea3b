"""Add a signal: a function `Prefill -> [B, T]` of the values of all tokens, and a scorer that asks for it by its name.

This one is the L2 norm of the hidden state that enters the last block.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokenseek_fx
from tokenseek_fx.passes import Prefill, signal
from tokenseek_fx.passes.analysis.blocks import Blocks
from tokenseek_fx.passes.analysis.token_axes import TokenAxes


@signal("hidden_norm")
def hidden_norm(prefill: Prefill) -> Tensor:
    axes, row_index = prefill.program[TokenAxes], prefill.row_index
    node = prefill.program[Blocks].last_entry(axes, row_index.axis)
    square = prefill.values[node].float().square()
    return row_index.by_token(square, axes.of(node), axes.row_dim(node)).sqrt()  # sums over all other dims


@tokenseek_fx.needs("hidden_norm")
def large_hidden(inputs: tokenseek_fx.ScoreInputs) -> Tensor:
    return inputs["hidden_norm"]


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    ids = torch.randint(64, (2, 24))
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    model.compile(backend="tokenseek", options={"scorer": large_hidden, "inner": "eager", "strict": True})
    with tokenseek_fx.record() as rec:
        model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(rec[0].scores, hidden.detach().norm(dim=-1))
    print(f"kept {rec[0].indices.tolist()}")


if __name__ == "__main__":
    main()
