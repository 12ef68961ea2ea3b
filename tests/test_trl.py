"""TRL: its head is off in training forwards, and what its trainers compute of the outputs has the gradient of the definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from compare import by_reference, error, grads_of
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from tokenseek_fx import Config, ConfigError, TokenSeekWarning, record, reference
from tokenseek_fx.compat import call_in_place
from tokenseek_fx.integrations.trl import PlainHead, fused_head
from tokenseek_fx.integrations.watched import Watched

B, T = 3, 13
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def fused(summed: bool, **options: Any) -> nn.Module:
    """A model as a trainer of TRL prepares it, and the callback after it."""
    model = zoo.build("llama")
    add_fused_lm_head(model, outputs=OUTPUTS)
    head = fused_head(model)
    assert head is not None and fused_head(zoo.build("llama")) is None
    watched = Watched(Config(inner="aot_eager", keep_ratio=0.5, strict=True, **options))
    with pytest.warns(TokenSeekWarning, match="fused head is off in training forwards"):
        call_in_place(model, PlainHead(model, head, watched, summed))
    return model


def packed() -> dict[str, Tensor]:
    """Documents behind one another, told by their positions, as ``packing`` makes them."""
    batch = zoo.batch(zoo.build("llama"), 1, T)
    return {**batch, "position_ids": torch.cat([torch.arange(6), torch.arange(T - 6)])[None]}


@pytest.mark.parametrize("kind", ["padded", "packed", "without logits"])
def test_a_sum_of_log_probabilities_is_a_loss_that_tokens_are_drawn_by(kind):
    """What SFTTrainer does with them, under gradient accumulation."""
    logits = "drop" if kind == "without logits" else "keep"
    model, batch = (
        fused(summed=True, logits=logits),
        packed() if kind == "packed" else zoo.batch(zoo.build("llama"), B, T, "right"),
    )
    before = zoo.build("llama")
    with record() as rec:
        output = model(**batch, fused_lm_head=True)
    loss = -output.log_probs.sum() / 50
    loss.backward()
    labelled = (batch["labels"][:, 1:] != -100).sum()
    assert torch.equal(output.label_mask.sum(), labelled)
    assert rec[0].weights is not None
    expected = by_reference(before, batch, rec[0].indices, weights=rec[0].weights).grads
    # the loss of transformers is in float32
    assert error(grads_of(model), {name: grad * labelled / 50 for name, grad in expected.items()}) < 1e-6
    with torch.no_grad():
        theirs = model(**batch, fused_lm_head=True)
    torch.testing.assert_close(loss.double(), -theirs.log_probs.sum().double() / 50)
    if logits == "drop":
        assert output.entropy.isnan().all() and output.is_top1.isnan().all(), "unknown, and not a wrong number"
        return
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(getattr(output, name).double(), getattr(theirs, name).double(), rtol=1e-5, atol=1e-5)


def test_any_other_use_of_log_probabilities_has_the_gradient_of_the_kept_rows():
    """What DPOTrainer does with them: no linear function of all of them. Labelled tokens are known, and kept first."""
    model, batch = (
        fused(summed=False, scorer="random", labelled_first=1.0),
        zoo.batch(zoo.build("llama"), 2, T, "right"),
    )
    eager = zoo.build("llama")
    with record() as rec:
        output = model(**batch, fused_lm_head=True)
    preference(output.log_probs).backward()
    kept = batch["labels"].roll(-1, 1).gather(1, rec[0].indices) != -100
    assert kept.all(), "as many tokens as are kept have a label"
    with reference.ditching(eager, rec[0].indices):
        logits = eager(**{name: x for name, x in batch.items() if name != "labels"}).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        preference(log_probs.masked_fill(labels == -100, 0)).backward()
    assert error(grads_of(model), grads_of(eager)) < 1e-6


def preference(log_probs: Tensor) -> Tensor:
    better, worse = log_probs.sum(1).chunk(2)
    return -nn.functional.logsigmoid(0.1 * (better - worse)).mean()


def test_calls_that_do_not_ask_for_the_head_have_logits():
    model, batch = fused(summed=True, scorer="random"), zoo.batch(zoo.build("llama"), B, T)
    plain = copy.deepcopy(model)
    assert plain._compiled_call_impl is None, "copies are plain"
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


def test_a_head_with_a_temperature_is_refused():
    model = zoo.build("llama")
    add_fused_lm_head(model, temperature=0.7)
    with pytest.raises(ConfigError, match=r"divides logits by 0\.7.* Set temperature=1\.0"):
        PlainHead(model, fused_head(model), Watched(Config()), summed=False)
