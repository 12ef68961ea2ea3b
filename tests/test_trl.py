"""TRL: training forwards skip the head, and what trainers compute from outputs has the gradient of the definition."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zoo
from compare import by_reference, error, grads_of
from datasets import Dataset
from test_trainer import Watch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from tokenseek_fx import Config, ConfigError, TokenSeekWarning, record, reference
from tokenseek_fx.compat import call_in_place
from tokenseek_fx.integrations import TokenSeekCallback
from tokenseek_fx.integrations.trl import PlainHead, fused_head
from tokenseek_fx.integrations.watched import Watched

B, T = 3, 13
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _fresh():
    """transformers writes settings of accelerate to the environment."""
    torch._dynamo.reset()
    with mock.patch.dict("os.environ"):
        yield


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
    """Concatenated documents, marked by their positions, as ``packing`` makes them."""
    batch = zoo.batch(zoo.build("llama"), 1, T)
    return {**batch, "position_ids": torch.cat([torch.arange(6), torch.arange(T - 6)])[None]}


@pytest.mark.parametrize("kind", ["padded", "packed", "without logits"])
def test_a_sum_of_log_probabilities_is_a_loss_that_tokens_are_drawn_by(kind):
    """As SFTTrainer uses them, under gradient accumulation."""
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
    """As DPOTrainer uses them: not a linear function of all. Labelled tokens are known, and kept first."""
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


# -- real runs of SFTTrainer ------------------------------------------------------------------------------------------


def sft(where: Path, *callbacks: TrainerCallback, **settings: Any) -> SFTTrainer:
    """On documents of 5 to 17 tokens, with the defaults of TRL but in float32."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 18, (24,), generator=generator).tolist()
    documents = [torch.randint(2, 97, (length,), generator=generator).tolist() for length in lengths]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, "<end>"))
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 2, "max_length": 20, "logging_steps": 1,
        "learning_rate": 1e-2, "bf16": False, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, **settings,
    }  # fmt: skip
    return SFTTrainer(
        zoo.build("llama", dtype=torch.float32),
        SFTConfig(str(where), **settings),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in documents]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"),
        callbacks=list(callbacks),
    )


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_training_that_keeps_all_tokens_is_that_of_trl(tmp_path, packing):
    logs = []
    for callbacks in ([], [TokenSeekCallback(keep_ratio=1.0, inner="aot_eager", strict=True)]):
        run = sft(tmp_path, *callbacks, packing=packing)
        run.train()
        logs.append([log for log in run.state.log_history if "loss" in log])
    assert len(logs[0]) == len(logs[1]) == 3
    for theirs, ours in zip(*logs, strict=True):
        assert ours["tokenseek_kept"] == 1
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.slow
def test_gradients_of_a_packed_run_are_those_of_the_definition(tmp_path):
    ours = TokenSeekCallback(keep_ratio=0.5, inner="aot_eager", strict=True)
    run = sft(tmp_path, ours, watch := Watch(ours), packing=True, max_steps=1, max_grad_norm=0)
    collate, batches = run.data_collator, []
    run.data_collator = lambda rows: batches.append(made := collate(rows)) or made
    run.train()
    batch, (rows,) = batches[0], watch.rows
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() > 2, "concatenated documents"
    assert rows.indices.shape[1] == -(-batch["input_ids"].shape[1] // 2)
    count = (batch["labels"][:, 1:] != -100).sum()
    fresh = zoo.build("llama", dtype=torch.float32)
    expected = by_reference(fresh, {**batch, "num_items_in_batch": count}, rows.indices, weights=rows.weights).grads
    assert error(watch.grads, expected) < 1e-5
    apart = {name: x for name, x in batch.items() if name in ("input_ids", "labels")}
    together = by_reference(fresh, {**apart, "num_items_in_batch": count}, rows.indices, weights=rows.weights).grads
    assert error(watch.grads, together) > 1e-2, "no document sees another one"
