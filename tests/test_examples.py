"""The examples of integrations, as their users run them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

EXAMPLES = Path(__file__).parents[1] / "examples"
EAGER = {"inner": "eager", "strict": True}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Settings of Dynamo and accelerate persist in their modules and in the environment: each example starts afresh."""
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with torch._dynamo.config.patch(optimize_ddp=True), mock.patch.dict("os.environ"):
        yield


def main(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return __import__(name).main(2, **EAGER)


def trained(logs: list[dict]) -> dict:
    """The figures of the one training log."""
    (log,) = (log for log in logs if "loss" in log)
    return log


def test_trainer():
    assert trained(main("trainer"))["tokenseek_kept"] == 0.2


def test_sft():
    """With adapters and the default gradient checkpointing, whose hooks Dynamo can't trace."""
    log = trained(main("sft"))
    assert 0.2 <= log["tokenseek_kept"] < 0.22 and 0 <= log["mean_token_accuracy"] <= 1


def test_dpo():
    log = trained(main("dpo"))
    assert 0.5 <= log["tokenseek_kept"] < 0.52 and "rewards/margins" in log
    assert log["tokenseek_kept_labelled"] > log["tokenseek_kept"]


def test_lightning_module():
    figures = main("lightning_module")
    assert figures["kept"] == pytest.approx(0.2)
    assert figures["of_checkpoint"] == pytest.approx(figures["held_out"], rel=1e-6)


@pytest.mark.parametrize("name", ["accelerate_loop", "loop"])
def test_loops(name, capsys):
    losses = main(name)
    assert len(losses) == 2 and "kept 32 of 160" in capsys.readouterr().out


def test_all_examples_are_tested():
    helpers = {"data", "demo", "measure", "small", "training"}
    tested = {"trainer", "sft", "dpo", "lightning_module", "accelerate_loop", "loop"}
    tested |= {"pairs", "write_report"}  # by test_cli.py and test_report_browser.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} - helpers == tested
