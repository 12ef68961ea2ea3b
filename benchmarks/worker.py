"""Measure one row of one setting in this process: step time, peak memory, saved bytes, first step, loss.

A step is forward and backward (`FORWARD`: only the forward, without gradient). Peak memory is that beyond the model and
its gradients: on CUDA the memory that PyTorch allocated; on the CPU resident memory, measured twice: with freed tensors
returned to the system at once (*peak*: memory in use), and with the usual behaviour of the C allocator (*resident*).
"""

import ctypes
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import measure
import peers
import torch
from shapes import SHAPES, Setting
from torch import Tensor, nn

Result = dict[str, Any]
Batch = dict[str, Tensor]

# glibc keeps freed memory, by an amount that depends more on the order of sizes than on memory in use. With a fixed
# threshold, tensors are mapped and unmapped one by one, and resident memory is memory in use. This slows down all rows,
# so times are measured after `usual_allocator`.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 32 << 20  # the maximum of glibc's dynamic threshold, reached when a tensor of that size is freed: mallopt(3)


def usual_allocator() -> None:
    """Set glibc's thresholds to their usual values in a process that trains."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc: the threshold had no effect
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)


def step(model: nn.Module, inputs: Batch, trains: bool) -> Result:
    """Run a step: seconds of the forward and of the whole step, and the loss. Gradients stay allocated."""
    model.zero_grad(set_to_none=False)
    begin = now(inputs)
    with torch.set_grad_enabled(trains):
        loss = model(**inputs).loss
    middle = now(inputs)
    if trains:
        loss.backward()
    return {"forward": middle - begin, "step": now(inputs) - begin, "loss": loss.item()}


def now(inputs: Batch) -> float:
    """The time in seconds, after the device has finished its work."""
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def work(row: str, setting: Setting, steps: int, seconds: float) -> Result:
    """All figures of one row."""
    for name in EXACT_MEMORY:  # this process has read it, and it would slow down the C++ compiler
        os.environ.pop(name, None)
    model, inputs = peers.EVERY[row](setting.model(), setting.keep_ratio), setting.inputs()
    trains = row != peers.FORWARD
    first = step(model, inputs, trains)
    figures = on_cuda if setting.device == "cuda" else on_cpu
    found = {"first": first["step"], "loss": first["loss"], **figures(model, inputs, trains, steps, seconds)}
    return {**found, **saved(model, inputs, SHAPES[setting.shape].vocab, trains)}


def on_cpu(model: nn.Module, inputs: Batch, trains: bool, steps: int, seconds: float) -> Result:
    """Figures on the CPU: a step for memory in use, a step in which the heap grows to its usual size, timed steps."""
    with measure.PeakMemory() as exact:
        step(model, inputs, trains)
    usual_allocator()
    step(model, inputs, trains)
    with measure.PeakMemory() as usual:
        times = timed(model, inputs, trains, steps, seconds)
    return {"peak": exact.bytes, "resident": usual.bytes, **times}


def on_cuda(model: nn.Module, inputs: Batch, trains: bool, steps: int, seconds: float = 0) -> Result:
    """Figures on CUDA: timed steps, and the peaks of allocated and reserved memory beyond model and gradients."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    times = timed(model, inputs, trains, steps, seconds)
    peak, resident = torch.cuda.max_memory_allocated() - base, torch.cuda.max_memory_reserved() - base
    return {"base": base, "peak": peak, "resident": resident, **times}


def timed(model: nn.Module, inputs: Batch, trains: bool, steps: int, seconds: float) -> Result:
    """Times of at least `steps` steps and `seconds` seconds."""
    found, end = [], time.monotonic() + seconds
    while len(found) < steps or time.monotonic() < end:
        found.append(step(model, inputs, trains))
    return {key: [one[key] for one in found] for key in ("step", "forward")}


def saved(model: nn.Module, inputs: Batch, vocab: int, trains: bool) -> Result:
    """Bytes that one forward saves for backward."""
    return measure.saved_bytes(model, inputs, vocab) if trains else {"activations": 0, "logits": 0}


def room(card: float) -> float:
    """Bytes for PyTorch on a card of `card` GiB, without those of the driver and the CUDA context."""
    return (card - 1) * 2**30 if card > 8 else card * 2**30


def largest(row: str, setting: Setting, card: float) -> Result:
    """Whether a step with AdamW fits on a card of `card` GiB, including weights, gradients and optimizer states."""
    cuda, limit = setting.device == "cuda", room(card)
    if cuda:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    with measure.PeakMemory() as peak:
        model, inputs = peers.EVERY[row](setting.model(), setting.keep_ratio), setting.inputs()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        for _ in range(2):  # in the second step, optimizer states exist during the forward
            step(model, inputs, True)
            optimizer.step()
    used = torch.cuda.max_memory_allocated() if cuda else peak.bytes
    return {"used": used, "fits": used <= limit}


def out_of_memory(error: BaseException) -> bool:
    """True for an error of memory; on the CPU only PyTorch's message shows it."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def main() -> int:
    """Run `worker.py TASK`: print the figures, or the error, as the last line."""
    task = json.loads(sys.argv[1])
    setting = Setting(**task["setting"])
    try:
        if task["limit"]:
            result = largest(task["row"], setting, task["limit"])
        else:
            result = work(task["row"], setting, task["steps"], task["seconds"])
    except Exception as error:
        traceback.print_exc()
        full = out_of_memory(error)
        result = {"failed": "out of memory" if full else str(error).strip().splitlines()[0][:200], "memory": full}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
