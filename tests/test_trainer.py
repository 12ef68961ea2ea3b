"""transformers' Trainer with TokenSeekCallback: what the callback adds, and that nothing else changes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zoo
from accelerate.utils import DynamoBackend
from compare import by_reference, error
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

import tokenseek_fx
from tokenseek_fx import ConfigError
from tokenseek_fx.integrations import TokenSeekCallback
from tokenseek_fx.peak import forget_peak

KEEP = {"keep_ratio": 0.5, "inner": "aot_eager"}
FIGURES = {"kept", "kept_labelled", "scoring_share", "recompiles", "activations_mib", "peak_mib"}
T, STEPS = 12, 4


class Tracker(TrainerCallback):
    """Stands in for those of ``report_to``, which Trainer calls before the callbacks of the user."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, *args: Any, logs: dict, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


class Kill(TrainerCallback):
    """Ends the process, as far as Trainer can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Take(TrainerCallback):
    """Briefly allocates this many bytes, in one step."""

    def __init__(self, bytes_: int, step: int) -> None:
        self.bytes, self.step = bytes_, step

    def on_step_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            torch.ones(self.bytes, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _fresh():
    """transformers writes settings of accelerate to the environment."""
    torch._dynamo.reset()
    with mock.patch.dict("os.environ"):
        yield


def examples(count: int = 16) -> list[dict]:
    """With a column that the model doesn't know."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(97, (count, T), generator=generator)
    labels = ids.masked_fill(torch.arange(T) < 4, -100)
    return [{"input_ids": row, "labels": label, "title": "text"} for row, label in zip(ids, labels, strict=True)]


def trainer(where: Path, *callbacks: TrainerCallback, model: Any = None, **settings: Any) -> Trainer:
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 1e-2, **settings,
    }  # fmt: skip
    return Trainer(
        model if model is not None else zoo.build("llama", dtype=torch.float32, layers=1),
        TrainingArguments(str(where), **settings),
        train_dataset=examples(),
        eval_dataset=examples(3),
        callbacks=list(callbacks),
        compute_metrics=lambda seen: {"right": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
    )


def losses(run: Trainer) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def files(where: Path) -> set[str]:
    return {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Trainer, Trainer, Tracker]:
    """Without our callback and with it (after a tracker). A Trainer seeds random generators when it is created."""
    torch._dynamo.reset()
    (plain := trainer(tmp_path_factory.mktemp("plain"))).train()
    (ours := trainer(tmp_path_factory.mktemp("ours"), tracker := Tracker(), TokenSeekCallback(**KEEP))).train()
    return plain, ours, tracker


def test_logs_have_the_keys_of_the_trainer_and_our_figures(runs):
    plain, ours, tracker = runs
    added = {f"tokenseek_{name}" for name in FIGURES}
    for log, expected in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert set(log) == set(expected) | (added if "loss" in expected else set())
    trained = [log for log in ours.state.log_history if "loss" in log]
    assert len(trained) == STEPS and {log["tokenseek_kept"] for log in trained} == {0.5}
    assert all(0 < log["tokenseek_kept_labelled"] < 1 and log["tokenseek_recompiles"] == 0 for log in trained)
    assert all(0 < log["tokenseek_scoring_share"] < 0.5 and log["tokenseek_activations_mib"] > 0 for log in trained)
    assert [{**log, "step": None} for log in tracker.seen] == [{**log, "step": None} for log in ours.state.log_history]


def test_a_tracker_of_report_to_gets_our_figures(tmp_path):
    with mock.patch.dict("os.environ", TENSORBOARD_LOGGING_DIR=str(tmp_path / "board")):
        run = trainer(tmp_path, TokenSeekCallback(**KEEP), report_to=["tensorboard"])
        run.train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in FIGURES:
        expected = [log[f"tokenseek_{name}"] for log in run.state.log_history if "loss" in log]
        events = board.Scalars(f"train/tokenseek_{name}")
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx(expected)


@pytest.mark.skipif(not forget_peak(torch.device("cpu")), reason="this system can't reset the peak of a process")
def test_the_peak_is_that_of_the_steps_since_the_last_log(tmp_path):
    much = 2**29  # far above what a step of the model takes, or the allocator keeps
    torch.ones(2 * much, dtype=torch.uint8)  # before the run, so not counted
    run = trainer(tmp_path, TokenSeekCallback(**KEEP), Take(much, step=2), eval_strategy="no", save_strategy="no")
    run.train()
    first, taken, *after = [log["tokenseek_peak_mib"] * 2**20 for log in run.state.log_history if "loss" in log]
    assert first < taken and len(after) == STEPS - 2
    assert max(after) < taken - 0.9 * much


def test_checkpoints_have_the_files_and_tensors_of_the_trainer(runs):
    plain, ours, _ = runs
    there = Path(ours.args.output_dir)
    assert files(there) == files(Path(plain.args.output_dir)) != set()
    for checkpoint in sorted(there.glob("checkpoint-*")):
        saved = load_file(checkpoint / "model.safetensors")
        expected = load_file(Path(plain.args.output_dir) / checkpoint.name / "model.safetensors")
        assert {name: x.shape for name, x in saved.items()} == {name: x.shape for name, x in expected.items()}
    code = (
        "import sys, torch, transformers; sys.modules['tokenseek_fx'] = None\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(there / 'checkpoint-4')!r})\n"
        "torch.load(sys.argv[1] + '/checkpoint-4/optimizer.pt', weights_only=True)\n"
        f"torch.save(model.state_dict(), sys.argv[1] + '/again.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(there)], check=True, capture_output=True)
    for name, x in torch.load(there / "again.pt").items():
        torch.testing.assert_close(x, ours.model.state_dict()[name], rtol=0, atol=0)


def test_evaluation_is_plain(runs):
    """While training and after it: loss and metrics are those of the weights without a compiler, bit by bit."""
    _, ours, _ = runs
    fresh = trainer(Path(ours.args.output_dir), model=type(ours.model)(ours.model.config))
    fresh.model.load_state_dict(ours.model.state_dict())
    expected = fresh.evaluate()
    assert ours.model._compiled_call_impl is None
    last = [log for log in ours.state.log_history if "eval_loss" in log][-1]
    for found in (last, ours.evaluate()):
        assert {name: found[name] for name in ("eval_loss", "eval_right")} == {
            name: expected[name] for name in ("eval_loss", "eval_right")
        }


def test_a_killed_run_resumes_to_the_same_losses(runs, tmp_path):
    _, ours, _ = runs
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Kill(3), TokenSeekCallback(**KEEP)).train()
    torch.manual_seed(99)
    resumed = trainer(tmp_path, TokenSeekCallback(**KEEP))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(ours)
    for name, x in ours.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], x), name


def in_a_process(where: Path, killed_at: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``killed.py`` with the module path of this process."""
    line = [sys.executable, str(Path(__file__).parent / "killed.py"), str(where), str(killed_at)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_another_process_resumes_a_killed_one_to_the_same_losses(tmp_path, capsys):
    import killed  # which imports this file

    stopped = in_a_process(tmp_path / "killed", killed_at=3)
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr[-3000:]
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    run = in_a_process(tmp_path / "killed")
    assert run.returncode == 0, run.stderr[-3000:]
    killed.main(str(tmp_path / "whole"), "0")
    resumed, whole = (json.loads(text.splitlines()[-1]) for text in (run.stdout, capsys.readouterr().out))
    assert (resumed["trained"], whole["trained"]) == ([3, 4], [1, 2, 3, 4])
    assert resumed["losses"] == whole["losses"] and len(set(whole["losses"])) == STEPS


def test_the_progress_bar_stays_and_its_lines_have_our_figures(tmp_path, capsys):
    settings = {"disable_tqdm": False, "eval_strategy": "no", "save_strategy": "no"}
    shown = []
    for callbacks in ([], [TokenSeekCallback(keep_ratio=0.5, inner="eager")]):
        trainer(tmp_path, *callbacks, **settings).train()
        shown.append(capsys.readouterr())
    plain, ours = shown
    for text in shown:  # between these two, what is drawn depends on the time
        bar = re.findall(r"(\d+)%\|.*?\| (\d)/4 ", text.err)
        assert bar[0] == ("0", "0") and bar[-1] == ("100", "4")
    assert "tokenseek" not in plain.out and ours.out.count("'tokenseek_kept': '0.5'") == STEPS


class Watch(TrainerCallback):
    """Gradients of the first step, and the rows that each of its forwards kept."""

    def __init__(self, ours: TokenSeekCallback) -> None:
        self.ours, self.rows, self.grads = ours, [], {}

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.rows.append(self.ours.selection)

    def on_pre_optimizer_step(self, args: Any, state: Any, *others: Any, model: Any, **kwargs: Any) -> None:
        self.rows.append(self.ours.selection)
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "tol"),
    [({"gradient_accumulation_steps": 2}, 1e-5), ({"bf16": True}, 2 * torch.finfo(torch.bfloat16).eps)],
)
def test_accumulated_and_mixed_gradients_are_those_of_the_definition(tmp_path, settings, tol):
    """The loss divides by the labelled tokens of all batches of the step.

    bfloat16: tests/test_setups.py explains the wide tolerance.
    """
    model, ours = zoo.build("llama", dtype=torch.float32), TokenSeekCallback(**KEEP)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    watch, batches = Watch(ours), []
    run = trainer(tmp_path, ours, watch, model=model, max_steps=1, max_grad_norm=0, save_strategy="no", **settings)
    collate = run.data_collator
    run.data_collator = lambda rows: batches.append(made := collate(rows)) or made
    run.train()
    assert len(watch.rows) == settings.get("gradient_accumulation_steps", 1)
    fresh = zoo.build("llama", dtype=torch.float32)
    fresh.load_state_dict(before)
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches[: len(watch.rows)])
    expected: dict[str, torch.Tensor] = {}
    for batch, rows in zip(batches, watch.rows, strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in settings):
            grads = by_reference(
                fresh, {**batch, "num_items_in_batch": count}, rows.indices, weights=rows.weights
            ).grads
        expected = {name: expected.get(name, 0) + grad for name, grad in grads.items()}
    assert error(watch.grads, expected) < tol


def test_models_compiled_otherwise_are_refused(tmp_path):
    compiled = zoo.build("llama", dtype=torch.float32)
    compiled.compile(backend="eager")
    with pytest.raises(ConfigError, match=r"already compiled\. Remove model\.compile"):
        trainer(tmp_path, TokenSeekCallback(**KEEP), model=compiled).train()
    with pytest.raises(ConfigError, match=r"torch_compile=True .* Remove torch_compile"):
        trainer(tmp_path, TokenSeekCallback(**KEEP), torch_compile=True, torch_compile_backend="eager").train()
    with pytest.raises(ConfigError, match="Did you mean 'keep_ratio'"):
        TokenSeekCallback(keep_ration=0.1)


def test_data_parallel_is_refused(tmp_path):
    """What the Trainer does where it sees two GPUs; wrapping needs none."""
    run = trainer(tmp_path, TokenSeekCallback(**KEEP))
    run.args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"on 2 GPUs with DataParallel, .* Start one process for each GPU"):
        run.train()
    assert isinstance(run.model_wrapped, torch.nn.DataParallel) and run.model._compiled_call_impl is None


def test_the_name_of_the_backend_in_training_arguments_is_refused_by_accelerate(tmp_path):
    """Its list of backends is closed; if it opens, docs/setups.md can name a shorter way."""
    with pytest.raises(ValueError, match="'TOKENSEEK' is not a valid DynamoBackend"):
        trainer(tmp_path, torch_compile=True, torch_compile_backend="tokenseek")
    page = (Path(__file__).parents[1] / "docs" / "setups.md").read_text()
    (allowed,) = re.findall(r"In\s+accelerate\s+1\.15\s+it\s+allows (.*?), in either case", page, re.DOTALL)
    assert re.findall(r"`(\w+)`", allowed) == [name.lower() for name in DynamoBackend.list()]


def test_without_transformers_one_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "tokenseek_fx.integrations.trainer")
    with pytest.raises(ImportError, match=r"not installed: pip install 'tokenseek-fx\[hf\]'"):
        _ = tokenseek_fx.integrations.TokenSeekCallback


@pytest.mark.slow
def test_the_scoring_share_is_known_where_the_model_runs_in_chunks(tmp_path):
    shares = []
    for size, recompute in ((1500, "rows"), (1 << 30, "rows"), (1500, "none")):
        torch._dynamo.reset()
        torch.manual_seed(0)
        ours = TokenSeekCallback(**KEEP, chunk_bytes=size, recompute=recompute)
        run = trainer(tmp_path / str(len(shares)), ours, max_steps=1, eval_strategy="no", save_strategy="no")
        run.train()
        shares.append(run.state.log_history[0]["tokenseek_scoring_share"])
    assert 0 < shares[0] == pytest.approx(shares[1])
    assert shares[2] > shares[0], "the step is shorter if no block is recomputed"
