"""Add an attention operation: one `@attention_rule(op)` names its query, key and value, and says how it scores.

The operation then defines the token axis and runs by position: the kept queries attend to the keys of all tokens.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx.passes import AttentionOp, attention_rule


def definition(query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
    scores = softcap * torch.tanh(query @ key.mT * query.shape[-1] ** -0.5 / softcap)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ value


def setup(ctx, inputs, output):
    *qkv, ctx.softcap = inputs
    ctx.save_for_backward(*qkv)


def backward(ctx, grad):
    return *torch.func.vjp(lambda *qkv: definition(*qkv, ctx.softcap), *ctx.saved_tensors)[1](grad), None


capped = torch.library.custom_op("extend::capped_attention", definition, mutates_args=())
capped.register_fake(lambda query, key, value, softcap: torch.empty_like(query))
capped.register_autograd(backward, setup_context=setup)


@attention_rule(torch.ops.extend.capped_attention.default)
def rule(given: dict) -> AttentionOp:
    return AttentionOp(given["query"], given["key"], given["value"], is_causal=True, softcap=given["softcap"])


class Model(nn.Module):
    """One block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(31, 16), nn.Linear(16, 48), nn.Linear(16, 31)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + capped(q, k, v, 5.0).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def main() -> None:
    torch.manual_seed(0)
    model, ids, options = Model(), torch.randint(31, (3, 12)), {"keep_ratio": 0.25, "inner": "eager", "strict": True}
    with contextlib.redirect_stdout(None), tokenseek_fx.record() as rec:
        report = tokenseek_fx.explain(model, ids, ids, options=options)
        loss = torch.compile(model, backend="tokenseek", options=options)(ids, ids)
    actual = torch.autograd.grad(loss, [*model.parameters()])
    with tokenseek_fx.reference.ditching(model, rec[0].indices, weights=rec[0].weights):
        expected = torch.autograd.grad(model(ids, ids), [*model.parameters()])
    torch.testing.assert_close(actual, expected)
    assert report.attentions[0].startswith("extend.capped_attention") and not report.barriers
    print(f"T = {report.tokens}, found from {report.attentions[0]}; no barrier, and the gradient of the definition")


if __name__ == "__main__":
    main()
