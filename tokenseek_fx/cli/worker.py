"""The process that measures one way to train: ``python -m tokenseek_fx.cli.worker TASK`` reads and prints JSON."""

from __future__ import annotations

import gc
import json
import sys
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..peak import forget_peak, peak_bytes, status_bytes
from .bench import Task
from .models import Adapter, batch_for, device_and_dtype, with_weights


def measure(task: Task) -> dict[str, Any]:
    """Seconds of the first step, which compiles; the median of later steps; and their peak bytes beyond the model's."""
    torch.manual_seed(0)
    device, dtype, mixed = device_and_dtype(task.dtype, task.adapter)
    model = with_weights(task.model, dtype, device, task.adapter, random=True)
    batch = batch_for(model, task.batch, task.length)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    prepare(model, task)
    first = _timed(model, batch, optimizer, mixed)
    base = _in_use(device)
    seconds = [_timed(model, batch, optimizer, mixed) for _ in range(task.steps)]
    peak = peak_bytes(torch.device(device))
    return {
        "first_step_seconds": first,
        "step_seconds": median(seconds),
        "peak_bytes": None if peak is None or base is None else max(0, peak - base),
    }


def prepare(model: Any, task: Task) -> None:
    """Prepare the model for the task's way to train: compile it, or switch gradient checkpointing on."""
    if task.way == "compile":
        model.compile()
    elif task.way == "tokenseek":
        model.compile(backend="tokenseek", options=task.options)
    else:
        model.gradient_checkpointing_enable()
        if task.adapter:
            model.enable_input_require_grads()


def _timed(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, mixed: bool) -> float:
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=False)
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    loss.item()  # wait for the device
    return time.perf_counter() - start


def _in_use(device: str) -> int | None:
    """Reset the peak and return the bytes in use. None if the system can't reset it (CPU training outside Linux)."""
    gc.collect()
    if not forget_peak(torch.device(device)):
        return None
    return torch.cuda.memory_allocated() if device == "cuda" else status_bytes("VmRSS")


def main() -> None:
    """Measure the task given as JSON in the first argument."""
    given = json.loads(sys.argv[1])
    adapter = given.pop("adapter")
    if adapter:
        adapter = Adapter(**{**adapter, "targets": tuple(adapter["targets"])})
    print(json.dumps(measure(Task(**given, adapter=adapter))))


if __name__ == "__main__":
    main()
