"""The traced graph equals the two executed streams, once for every option; other tests only execute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import architectures
import pytest
import torch
import zoo
from compare import Run, compiled, error, executed, traced
from test_scores import NAMES, Decoder, decoder, favourite, packed, padded, tokens, with_loss
from torch import Tensor, nn

OPTIONS: dict[str, dict[str, Any]] = {
    **{f"scorer {name}": {"scorer": name} for name in NAMES},
    **{f"scorer {name}, drawn": {"scorer": name, "select": "sample"} for name in ("tokenseek", "loss", "random")},
    "scorer of one's own": {"scorer": favourite},
    "attention of all layers": {"scorer": "tokenseek", "attention_layers": "all"},
    "attention of some layers": {"scorer": "attention", "attention_layers": [0, -1]},
    "gradient of the head": {"scorer": "tokenseek", "gradient_of": "head"},
    "factors": {"scorer": "tokenseek", "alpha": 0.3, "beta": 2.0},
    "attention alone": {"scorer": "tokenseek", "beta": 0.0},
    "gradient alone": {"scorer": "tokenseek", "alpha": 0.0},
    "mix": {"scorer": "loss", "select": "sample", "mix": 0.9},
    "weight_clip": {"scorer": "loss", "select": "sample", "weight_clip": 1.2},
    "labelled_first": {"scorer": "first", "labelled_first": 1.0},
    "keep_label": {"scorer": "first", "keep_label": False},
    "pinned": {"scorer": "tokenseek", "pinned": (0, -2)},
    "keep_tokens": {"keep_tokens": 5, "keep_ratio": None},
    "logits dropped": {"logits": "drop"},
    "logits dropped, full loss": {"scorer": "tokenseek", "logits": "drop", "report_loss": "full"},
    "full loss without scores": {"report_loss": "full"},
    "kept loss": {"scorer": "tokenseek", "report_loss": "kept"},
    "live keys and values": {"scorer": "tokenseek", "kv_grad": "all"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option(case):
    assert_equal(decoder(), tokens(), run=traced, **OPTIONS[case])


BATCHES = {"left": lambda: padded("left"), "right": lambda: padded("right"), "packed": packed}


@pytest.mark.parametrize("batch", BATCHES)
def test_a_mask(batch):
    assert_equal(decoder(), BATCHES[batch](), scorer="tokenseek")


@cache
def summed() -> Decoder:
    return with_loss("sum", label_smoothing=0.1, ignore_index=3, weighted=True)


def test_a_loss_of_all_settings():
    batch = tokens()
    batch["labels"] = batch["labels"].where(batch["labels"] >= 0, 3)
    assert_equal(summed(), batch, scorer="tokenseek", select="sample")


def test_eager_attention():
    assert_equal(decoder(attention="eager"), packed(), scorer="tokenseek")


@pytest.mark.parametrize("kv_grad", ["selected", "all"])
def test_a_llama(kv_grad):
    """Its output is a record; its losses are in float32."""
    model = zoo.build("llama")
    assert_equal(model, zoo.batch(model, 3, 13, "right"), tol=1e-6, scorer="tokenseek", kv_grad=kv_grad)


def test_experts():
    model, batch = architectures.build("mixtral", "sdpa", 13, torch.float32)
    assert_equal(model, batch, tol=1e-5, scorer="tokenseek")


def test_two_token_axes():
    model, batch = architectures.build("t5", "eager", 13)
    assert_equal(model, batch, tol=1e-6, scorer="tokenseek", keep_ratio=[0.5, 0.3])


def test_another_form_of_the_batch_has_its_own_graph():
    """With the same form, other values give other results."""
    model = Decoder()
    first, second, other = (executed(model, tokens(seed), scorer="strided") for seed in (0, 0, 1))
    short = executed(model, {name: x[:, :11] for name, x in tokens().items()}, scorer="strided")
    assert first.loss == second.loss != other.loss
    assert error(first.grads, second.grads) == 0 and short.selection.scores.shape == (3, 11)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert executed(model, tokens(), scorer="strided").loss != first.loss


def test_what_needs_a_compiled_graph_is_refused():
    with pytest.raises(ValueError, match="chunk_bytes"):
        executed(decoder(), tokens(), chunk_bytes=1500)


def assert_equal(
    model: nn.Module, batch: dict[str, Any], tol: float = 1e-12, run: Callable[..., Run] = compiled, **options: Any
) -> None:
    """All results of a step are the same, with the same noise."""
    one, other = (each(model, batch, **{"seed": 1, **options}) for each in (run, executed))
    assert torch.equal(one.indices, other.indices)
    assert error(one.grads, other.grads) <= tol
    for x, y in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def values(run: Run) -> list[Tensor]:
    """The output of the model, and what is recorded."""
    recorded = [part for seen in (run.selection, *run.selection.others) for part in vars(seen).values()]
    leaves = torch.utils._pytree.tree_leaves((run.output, recorded))
    return [x.detach() for x in leaves if isinstance(x, Tensor)]
