"""Add a mixing operation: `axes_rule(op, rule=along("dim"))` says that it mixes along the dims that its argument names.

Along features it runs on the kept rows. Along tokens it is a barrier: exact, but over all tokens.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenseek_fx
from tokenseek_fx.passes import along, axes_rule


@torch.library.custom_op("extend::running_mean", mutates_args=())
def running_mean(x: Tensor, dim: int) -> Tensor:
    return x.cumsum(dim) / torch.ones_like(x).cumsum(dim)


def backward(ctx, grad):
    grad = grad / torch.ones_like(grad).cumsum(ctx.dim)
    return grad.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim), None


running_mean.register_fake(lambda x, dim: torch.empty_like(x))
running_mean.register_autograd(backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "dim", inputs[1]))
OP = torch.ops.extend.running_mean.default
axes_rule(OP, rule=along("dim"))


class Model(nn.Module):
    """One block: attention, then the running mean along a dim (1: tokens, 2: features)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.embed, self.qkv, self.head = dim, nn.Embedding(31, 16), nn.Linear(16, 48), nn.Linear(16, 31)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + running_mean(x, self.dim)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def main() -> None:
    torch.manual_seed(0)
    ids, options = torch.randint(31, (3, 12)), {"keep_ratio": 0.25, "inner": "eager", "strict": True}
    for name, dim in {"tokens": 1, "features": 2}.items():
        model = Model(dim)
        with contextlib.redirect_stdout(None), tokenseek_fx.record() as rec:
            barriers = tokenseek_fx.explain(model, ids, ids, options=options).barriers
            loss = torch.compile(model, backend="tokenseek", options=options)(ids, ids)
        actual = torch.autograd.grad(loss, [*model.parameters()])
        with tokenseek_fx.reference.ditching(model, rec[0].indices, weights=rec[0].weights):
            expected = torch.autograd.grad(model(ids, ids), [*model.parameters()])
        torch.testing.assert_close(actual, expected)
        assert [barrier.node.target for barrier in barriers] == [OP] * (name == "tokens")
        print(f"running_mean along {name}: {', '.join(barrier.reason for barrier in barriers) or 'no barrier'}")


if __name__ == "__main__":
    main()
