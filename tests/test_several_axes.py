"""Encoder-decoders: two token axes, a selection for each."""

from __future__ import annotations

import copy
from functools import cache

import architectures
import pytest
import torch
from architectures import B
from compare import assert_matches, by_reference, compiled, error, executed
from marks import PYTORCH
from torch._inductor.utils import fresh_cache

import tokenseek_fx

T = 13
S = T + 4
build = cache(architectures.build)  # one model for all tests, so that its graph is captured once


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_every_axis_has_its_own_ratio(name):
    model, batch = build(name, "sdpa", T)
    run = assert_matches(model, batch, 1e-6, length=T, keep_ratio=[0.5, 0.2])
    (encoder,) = run.selection.others
    assert run.indices.shape == (B, 7) and encoder.indices.shape == (B, 4)
    assert (encoder.indices.diff(dim=1) > 0).all() and encoder.indices.max() < S


@pytest.mark.slow
@pytest.mark.skipif(
    PYTORCH == (2, 11),
    reason="Dynamo of PyTorch 2.11 can't trace copy.deepcopy, which a new cache calls: T5 is refused there",
)
def test_inductor_with_the_cache_that_is_on_by_default():
    """The first keys are concatenated with an empty cache; Inductor lays out the result like the keys."""
    model, batch = build("t5", "sdpa", T)
    del model.encoder.block[1:], model.decoder.block[1:]
    options = {"keep_ratio": [0.5, 0.2], "inner": "inductor"}
    with fresh_cache():  # a cached kernel would hide an error in compiling it now
        assert_matches(model, {**batch, "use_cache": True}, 1e-5, length=T, **options)  # its norms are float32


def test_one_ratio_is_that_of_all_axes():
    model, batch = build("bart", "sdpa", T)
    run = executed(model, batch, keep_ratio=0.3)
    assert run.indices.shape == (B, 4) and run.selection.others[0].indices.shape == (B, 6)


def test_all_tokens_of_both_axes_give_the_ordinary_gradient():
    model, batch = build("bart", "sdpa", T)
    run = compiled(model, batch, keep_ratio=1.0, logits="drop")
    plain = copy.deepcopy(model)
    plain(**batch).loss.backward()
    assert error(run.grads, {name: p.grad for name, p in plain.named_parameters()}) < 1e-9


def test_the_default_trains_on_drawn_tokens_of_the_decoder_and_attended_ones_of_the_encoder():
    model, batch = build("bart", "sdpa", T)
    run = executed(model, batch, scorer="loss", select=None, report_loss="kept")
    (encoder,) = run.selection.others
    assert run.selection.weights is not None and encoder.weights is None
    assert encoder.attention is not None and encoder.loss is None
    expected = by_reference(model, batch, run.indices, T, run.selection.weights, others=run.selection.others)
    assert error(run.grads, expected.grads) < 1e-6


def test_encoder_tokens_are_scored_by_the_cross_attention_that_they_receive():
    model, batch = build("bart", "eager", T)
    run = executed(model, batch, scorer="attention")
    plain = copy.deepcopy(model)
    received = plain(**batch, output_attentions=True).cross_attentions[-1].sum((1, 2))
    torch.testing.assert_close(run.selection.others[0].attention, received.to(torch.float64), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scorer", ["gradient", "tokenseek"])
def test_encoder_tokens_are_scored_by_their_gradient_through_the_last_block(scorer):
    """Not through the blocks before it, whose cross-attention gets the encoder's output detached here."""
    model, batch = build("bart", "sdpa", T)
    run = executed(model, batch, scorer=scorer, select="topk")
    plain = copy.deepcopy(model)
    memory = plain.model.encoder(batch["input_ids"]).last_hidden_state.detach().requires_grad_()
    cross = plain.model.decoder.layers[0].encoder_attn
    cross.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "key_value_states": kwargs["key_value_states"].detach()}),
        with_kwargs=True,
    )
    plain(**batch, encoder_outputs=(memory,)).loss.backward()
    (encoder,) = run.selection.others
    torch.testing.assert_close(encoder.gradient, memory.grad.abs().sum(-1), rtol=1e-6, atol=1e-12)
    assert encoder.indices.tolist() == encoder.scores.topk(6).indices.sort(-1).values.tolist()


def test_noise_is_drawn_for_every_axis():
    model, batch = build("bart", "sdpa", T)
    first, second = (executed(model, batch, seed=3).selection for _ in range(2))
    assert first.indices.equal(second.indices) and first.others[0].indices.equal(second.others[0].indices)
    other = executed(model, batch, seed=4).selection
    assert not other.others[0].indices.equal(first.others[0].indices)


def test_rows_given_for_one_axis_are_refused():
    model, batch = build("bart", "sdpa", T)
    rows = torch.arange(3).expand(B, 3)
    run = torch.compile(model, backend="tokenseek", options={"inner": "eager"})
    with pytest.raises(Exception, match="given for one token axis, but the graph has 2"), tokenseek_fx.selecting(rows):
        run(**batch)


def test_explain_reports_every_axis(capsys):
    model, batch = build("bart", "sdpa", T)
    report = tokenseek_fx.explain(model, **batch, options={"keep_ratio": [0.5, 0.2]})
    assert (report.tokens, report.kept, report.others) == (T, 7, ((S, 4),))
    assert "and 4 of 17 on a further token axis" in capsys.readouterr().out
