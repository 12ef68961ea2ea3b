"""cross_entropy with class probabilities: rows are drawn and weighted by their loss, as with class labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_matches, compiled, executed
from test_backend import Model, T, V, data
from torch import Tensor

LOSSES = {
    "flat": lambda z, p: F.cross_entropy(z.flatten(0, 1), p.flatten(0, 1)),
    "sum": lambda z, p: F.cross_entropy(z.flatten(0, 1), p.flatten(0, 1), reduction="sum") / 100,
    "classes second": lambda z, p: F.cross_entropy(z.transpose(1, 2), p.transpose(1, 2)),
    "class weights": lambda z, p: F.cross_entropy(z.flatten(0, 1), p.flatten(0, 1), torch.linspace(1, 2, V).double()),
    "smoothing": lambda z, p: F.cross_entropy(z.flatten(0, 1), p.flatten(0, 1), label_smoothing=0.1),
}
DRAWN = {"scorer": "loss", "select": "sample"}


def model(name: str) -> Model:
    return Model(lambda self, x, p: LOSSES[name](self.lm_head(x), p), layers=1)


def batch(size: int) -> dict[str, Tensor]:
    probabilities = torch.rand(size, T, V, generator=torch.Generator().manual_seed(2)).double().softmax(-1)
    return {"ids": data(size)["ids"], "labels": probabilities}


@pytest.mark.parametrize("options", [DRAWN, {**DRAWN, "report_loss": "full"}, {"scorer": "gradient"}])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_match_the_reference(name, options):
    for size in (2, 3) if options is DRAWN else (2,):
        assert_matches(model(name), batch(size), 1e-9, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_scores_are_the_losses_of_the_tokens(name):
    plain, inputs = model(name), batch(3)
    seen = executed(plain, inputs, **DRAWN).selection
    logits = []
    plain.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    plain(**inputs)
    options = {"class weights": {"weight": torch.linspace(1, 2, V).double()}, "smoothing": {"label_smoothing": 0.1}}
    z, p = logits[0].flatten(0, 1), inputs["labels"].flatten(0, 1)
    expected = F.cross_entropy(z, p, reduction="none", **options.get(name, {})).view(3, T)
    torch.testing.assert_close(seen.loss, expected, rtol=1e-9, atol=1e-12)
    assert seen.weights is not None and (seen.weights > 1).any()


def test_logits_are_not_built():
    """With logits="drop" and small chunks, the loss of all tokens is computed from chunks of logits."""
    with_logits = Model(lambda self, x, p: (LOSSES["flat"](self.lm_head(x), p), self.lm_head(x)), layers=1)
    options = {**DRAWN, "seed": 0, "keep_ratio": 0.3}
    kept = compiled(with_logits, batch(2), **options)
    dropped = compiled(with_logits, batch(2), logits="drop", chunk_bytes=512, **options)
    assert torch.equal(kept.indices, dropped.indices) and dropped.output[1].shape == (2, 0, V)
    torch.testing.assert_close(dropped.loss, kept.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(dropped.grads, kept.grads, rtol=1e-9, atol=1e-12)
