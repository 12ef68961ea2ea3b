"""One training step on two processes, for tests/test_distributed.py.

    torchrun --nproc_per_node=2 tests/distributed.py DIRECTORY WAY...

Each process writes its rows, the kept ones, and the gradients, which are the same in all processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zoo
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

import tokenseek_fx
from tokenseek_fx.integrations import TokenSeekCallback

PROCESSES, B, T = 2, 3, 13
OPTIONS = {"inner": "eager", "keep_ratio": 0.5, "strict": True}
Step = tuple[dict[str, Tensor], Any, dict[str, Tensor]]


def model() -> nn.Module:
    """Its gradients fill several buckets of 1 MB."""
    return zoo.build("llama", vocab=9001, layers=1)


def batch(rank: int) -> dict[str, Tensor]:
    """The batch of a process, for hand-written loops."""
    return {name: x[rank::PROCESSES] for name, x in zoo.batch(model(), PROCESSES * B, T, "right").items()}


def ddp() -> Step:
    """Compiled inside DDP."""
    trained = model()
    trained.compile(backend="tokenseek", options=OPTIONS)
    with torch._dynamo.config.patch(optimize_ddp=False):
        return step(trained, nn.parallel.DistributedDataParallel(trained, bucket_cap_mb=1))


def fsdp2() -> Step:
    """The whole model is one unit."""
    trained: Any = model()
    fully_shard(trained)
    trained.compile(backend="tokenseek", options=OPTIONS)
    inputs, selection, grads = step(trained, trained)
    return inputs, selection, {name: grad.full_tensor() for name, grad in grads.items()}


def fsdp2_blocks() -> Step:
    """Each block is a unit, at which Dynamo splits the model, so the rows are given."""
    trained: Any = model()
    for layer in trained.model.layers:
        fully_shard(layer)
    fully_shard(trained)
    trained.compile(backend="tokenseek", options=OPTIONS)
    indices = torch.arange(1, T, 2).repeat(B, 1)
    with tokenseek_fx.selecting(indices):
        inputs, _, grads = step(trained, trained)
    selection = tokenseek_fx.Selection(indices, torch.zeros(B, T))
    return inputs, selection, {name: grad.full_tensor() for name, grad in grads.items()}


def step(trained: nn.Module, call: nn.Module) -> Step:
    inputs = batch(dist.get_rank())
    with tokenseek_fx.record() as rec:
        call(**inputs).loss.backward()
    return inputs, rec[0] if rec else None, {name: p.grad for name, p in trained.named_parameters()}


class Keep(TrainerCallback):
    """Gradients of the first step."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters()}


def trainer() -> Step:
    """transformers' Trainer, which wraps the model in DDP itself."""
    ours, keep, batches = TokenSeekCallback(**OPTIONS), Keep(), []
    settings = {"max_steps": 1, "per_device_train_batch_size": B, "max_grad_norm": 0, "save_strategy": "no"}
    arguments = TrainingArguments(
        sys.argv[1], use_cpu=True, report_to=[], ddp_bucket_cap_mb=1, disable_tqdm=True, **settings
    )
    every = zoo.batch(model(), PROCESSES * B, T, "right")
    rows = [dict(zip(every, row, strict=True)) for row in zip(*every.values(), strict=True)]
    run = Trainer(model(), arguments, train_dataset=rows, callbacks=[ours, keep])
    collate = run.data_collator
    run.data_collator = lambda rows: batches.append(made := collate(rows)) or made
    run.train()
    return batches[0], ours.selection, keep.grads


def main(where: Path, ways: list[str]) -> None:
    if "trainer" not in ways:
        dist.init_process_group("gloo")
    for way in ways:
        torch._dynamo.reset()
        inputs, selection, grads = globals()[way]()
        rows = {"indices": selection.indices, "weights": selection.weights}
        torch.save({"batch": inputs, "grads": grads, **rows}, where / f"{way}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
