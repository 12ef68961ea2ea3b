"""Break down the time of a training step by kernel, on a CUDA device.

    python benchmarks/breakdown.py                                  # the first setting of gpu.py, tokenseek
    python benchmarks/breakdown.py --row torch.compile --batch 4

The step time is wall-clock time: the median of five steps after three for warm-up. The table shows one more step under
torch.profiler.
"""

import argparse
import statistics
import sys
from dataclasses import replace

import gpu
import peers
import report
import suite
import torch
from shapes import SHAPES, Setting
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from worker import on_cuda, step


def measure(setting: Setting, row: str, count: int) -> str:
    """Times, peak memory beyond weights and gradients, and the ``count`` slowest kernels, as text."""
    model, inputs = peers.ROWS[row](setting.model(), setting.keep_ratio), setting.inputs()
    for _ in range(3):
        step(model, inputs, True)
    found = on_cuda(model, inputs, True, 5)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(model, inputs, True)
    events = [event for event in profiled.key_averages() if event.device_type is DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    times = ", ".join(f"{name} {statistics.median(found[name]):.3f} s" for name in ("step", "forward"))
    lines = [
        [f"{event.self_device_time_total / 1e3:.2f}", str(event.count), event.key[:90]] for event in events[:count]
    ]
    total = sum(event.self_device_time_total for event in events) / 1e3
    lines.append([f"{total:.2f}", str(sum(event.count for event in events)), "all"])
    head = f"{setting}: {row}: {times}, peak {found['peak'] / 2**30:.2f} GiB\n\n"
    return head + report.table(["ms", "launches", "kernel"], lines)


def main(words: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(peers.ROWS), default=peers.DEFAULT, metavar="ROW")
    parser.add_argument("--shape", choices=list(SHAPES), default=gpu.BASE.shape)
    parser.add_argument("--length", type=int, default=gpu.BASE.length)
    parser.add_argument("--batch", type=int, default=gpu.BASE.batch)
    parser.add_argument("--count", type=int, default=25, help="kernels in the table")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("No CUDA device was found. Run this on a machine with one.")
        return 1
    setting = replace(gpu.BASE, shape=options.shape, length=options.length, batch=options.batch)
    print(measure(setting, options.row, options.count))
    print(suite.machine())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
