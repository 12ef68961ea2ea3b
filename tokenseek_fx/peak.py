"""The most memory that this process takes: counted anew, and read."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> bool:
    """Count the peak anew from here on. False where the system can't (a CPU, not Linux or not permitted): it then goes on from before.

    There is one count for the whole process: a reset moves it for all that read it, here ``torch.cuda.max_memory_allocated`` of this
    device, or ``VmHWM`` and ``ru_maxrss``. What is in use is not touched.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int | None:
    """The most that was allocated on the device since ``forget_peak``; on the CPU, the most that was resident. Where ``forget_peak`` is
    False it is the most since the process began; None where that is not known either (Windows)."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return status_bytes("VmHWM") or _resident_ever()


def status_bytes(name: str) -> int | None:
    """A line of Linux's account of the process; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _resident_ever() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
