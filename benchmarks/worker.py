"""One row of one setting, measured in this process: step time, peak memory, saved bytes, first step, loss.

A step is forward + backward (`FORWARD`: the forward alone, without gradient). Peak memory is that above the model and its
gradients: on CUDA what PyTorch has allocated; on the CPU resident memory, once with every freed tensor given back to the system
at once (*peak*: what is in use) and once as the C allocator keeps it (*resident*).
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

# glibc keeps freed memory for itself, by an amount that depends on the order of sizes more than on what is in use. With a
# fixed threshold tensors are mapped and unmapped one by one, and resident memory is memory in use. It slows every row, so
# times are taken after `usual_allocator`.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 32 << 20  # where glibc's own threshold ends up once a tensor of that size was freed: mallopt(3)


def usual_allocator() -> None:
    """glibc's thresholds as they are in a process that trains, from here on."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc, so the threshold was not read either
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)


def step(model: nn.Module, inputs: Batch, trains: bool) -> Result:
    """Seconds of the forward and of all, and the loss; gradients stay allocated."""
    model.zero_grad(set_to_none=False)
    begin = now(inputs)
    with torch.set_grad_enabled(trains):
        loss = model(**inputs).loss
    middle = now(inputs)
    if trains:
        loss.backward()
    return {"forward": middle - begin, "step": now(inputs) - begin, "loss": loss.item()}


def now(inputs: Batch) -> float:
    """Seconds, once the device has done what it was given."""
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def work(row: str, setting: Setting, steps: int, seconds: float) -> Result:
    """All figures of one row."""
    for name in EXACT_MEMORY:  # this process has read it; the C++ compiler would be slow under it
        os.environ.pop(name, None)
    model, inputs = peers.ROWS[row](setting.model(), setting.keep_ratio), setting.inputs()
    trains = row != peers.FORWARD
    first = step(model, inputs, trains)
    figures = on_cuda if setting.device == "cuda" else on_cpu
    found = {"first": first["step"], "loss": first["loss"], **figures(model, inputs, trains, steps, seconds)}
    return {**found, **saved(model, inputs, SHAPES[setting.shape].vocab, trains)}


def on_cpu(model: nn.Module, inputs: Batch, trains: bool, steps: int, seconds: float) -> Result:
    """One step for memory in use; a step in which the heap takes its usual size; then the timed ones."""
    with measure.PeakMemory() as exact:
        step(model, inputs, trains)
    usual_allocator()
    step(model, inputs, trains)
    with measure.PeakMemory() as usual:
        times = timed(model, inputs, trains, steps, seconds)
    return {"peak": exact.bytes, "resident": usual.bytes, **times}


def on_cuda(model: nn.Module, inputs: Batch, trains: bool, steps: int, seconds: float = 0) -> Result:
    """Timed steps; what was allocated above model and gradients, and what the caching allocator held."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    times = timed(model, inputs, trains, steps, seconds)
    peak, resident = torch.cuda.max_memory_allocated() - base, torch.cuda.max_memory_reserved() - base
    return {"base": base, "peak": peak, "resident": resident, **times}


def timed(model: nn.Module, inputs: Batch, trains: bool, steps: int, seconds: float) -> Result:
    """At least so many steps, and steps for at least so many seconds."""
    found, end = [], time.monotonic() + seconds
    while len(found) < steps or time.monotonic() < end:
        found.append(step(model, inputs, trains))
    return {key: [one[key] for one in found] for key in ("step", "forward")}


def saved(model: nn.Module, inputs: Batch, vocab: int, trains: bool) -> Result:
    """Bytes that one forward keeps for backward."""
    return measure.saved_bytes(model, inputs, vocab) if trains else {"activations": 0, "logits": 0}


def room(card: float) -> float:
    """Bytes for PyTorch on a card of so many GiB: what the driver and CUDA's context take is left out."""
    return (card - 1) * 2**30 if card > 8 else card * 2**30


def largest(row: str, setting: Setting, card: float) -> Result:
    """Does a step with AdamW fit on a card of so many GiB, weights, gradients and optimizer states included?"""
    cuda, limit = setting.device == "cuda", room(card)
    if cuda:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    with measure.PeakMemory() as peak:
        model, inputs = peers.ROWS[row](setting.model(), setting.keep_ratio), setting.inputs()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        for _ in range(2):  # in the second the optimizer's states are there during the forward
            step(model, inputs, True)
            optimizer.step()
    used = torch.cuda.max_memory_allocated() if cuda else peak.bytes
    return {"used": used, "fits": used <= limit}


def out_of_memory(error: BaseException) -> bool:
    """Of the device; on the CPU PyTorch says it in the message."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def main() -> int:
    """`worker.py TASK`: the figures as the last line; an error is a figure too."""
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
