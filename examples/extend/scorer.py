"""Add a scorer: a function `ScoreInputs -> scores [B, T]`, and a name for `Config(scorer=...)`.

This one keeps tokens in spans: it scores a token by the mean loss of the token and its two neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokenseek_fx
from tokenseek_fx import Config, ScoreInputs


@tokenseek_fx.needs("loss")  # signals that nothing asks for are not computed
def span_loss(inputs: ScoreInputs) -> Tensor:
    return F.avg_pool1d(inputs["loss"], kernel_size=3, stride=1, padding=1)


tokenseek_fx.register_scorer("span_loss", lambda: span_loss)


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    ids = torch.randint(64, (2, 24))
    model.compile(backend=tokenseek_fx.backend(Config(scorer="span_loss", keep_ratio=0.25, inner="eager", strict=True)))
    with tokenseek_fx.record() as rec:
        model(input_ids=ids, labels=ids).loss.backward()
    (selection,) = rec
    torch.testing.assert_close(selection.scores, span_loss(ScoreInputs(2, 24, ids.device, loss=selection.loss)))
    assert torch.equal(selection.indices, selection.scores.topk(6).indices.sort().values)
    print(f"kept {selection.indices.tolist()}")


if __name__ == "__main__":
    main()
