"""Add an elementwise operation: one line, `axes_rule(op, rule=elementwise)`.

Without a rule a custom operation is a barrier: it runs over all tokens. With this one it runs on the kept rows.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx.passes import axes_rule, elementwise


@torch.library.custom_op("extend::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.sigmoid()


def backward(ctx, grad):
    x, s = ctx.saved_tensors[0], ctx.saved_tensors[1].sigmoid()
    return grad * s, grad * x * s * (1 - s)


gated.register_fake(lambda x, gate: torch.empty_like(x))
gated.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
axes_rule(torch.ops.extend.gated.default, rule=elementwise)


class Model(nn.Module):
    """One block: attention, then a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.up, self.head = (nn.Embedding(31, 16), *(nn.Linear(16, n) for n in (48, 32, 31)))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + gated(*self.up(x).chunk(2, -1))
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
    assert not report.barriers
    print(f"gated runs on {report.kept} of {report.tokens} tokens, with the gradient of the definition")


if __name__ == "__main__":
    main()
