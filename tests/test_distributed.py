"""Two processes select and train on their own sequences: the gradients are those of one process on the same rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed
import pytest
import torch
from compare import Grads, by_reference, error

HERE = Path(__file__).parent
WAYS = ("ddp", "fsdp2", "fsdp2_blocks")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# accelerate's --cpu starts several processes only through mpirun; without a GPU, --multi_gpu uses gloo
SETTINGS = [
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", *SETTINGS]


def launch(launcher: list[str], *command: str) -> str:
    """What two processes printed; their output if they failed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, "-m", *launcher, *command]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout + run.stderr


def steps(where: Path, way: str) -> list[dict]:
    return [torch.load(where / f"{way}-{rank}.pt") for rank in range(distributed.PROCESSES)]


def on_one_process(steps: list[dict], **loss: torch.Tensor) -> Grads:
    """The sum of the gradients of all rows."""
    found = [
        by_reference(distributed.model(), {**step["batch"], **loss}, step["indices"], weights=step["weights"]).grads
        for step in steps
    ]
    return {name: sum(grads[name] for grads in found) for name in found[0]}


def assert_equal(steps: list[dict], expected: Grads) -> None:
    assert not torch.equal(steps[0]["batch"]["input_ids"], steps[1]["batch"]["input_ids"])
    for step in steps:
        assert error(step["grads"], expected) < 1e-6  # the loss of transformers is in float32


@pytest.mark.slow
def test_gradients_of_ddp_and_fsdp2_are_those_of_one_process(tmp_path):
    launch(TORCHRUN, str(HERE / "distributed.py"), str(tmp_path), *WAYS)
    for way in WAYS:
        found = steps(tmp_path, way)
        mean = {name: grad / distributed.PROCESSES for name, grad in on_one_process(found).items()}
        assert_equal(found, mean)


@pytest.mark.slow
def test_gradients_of_a_trainer_are_those_of_one_process_and_optimize_ddp_is_reported_off(tmp_path):
    """The Trainer divides by the labelled tokens of all processes."""
    said = launch(ACCELERATE, str(HERE / "distributed.py"), str(tmp_path), "trainer")
    assert "optimize_ddp is switched off during training" in said
    found = steps(tmp_path, "trainer")
    count = sum((step["batch"]["labels"][:, 1:] != -100).sum() for step in found)
    assert_equal(found, on_one_process(found, num_items_in_batch=count))
