"""Reset and read the peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> bool:
    """Reset the peak. False if the system can't (CPU, outside Linux or without permission): the peak then stays.

    The process has one counter: a reset affects all its readers, ``torch.cuda.max_memory_allocated`` of this device, or
    ``VmHWM`` and ``ru_maxrss``. Memory in use is not affected.
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
    """Peak bytes allocated on the device since ``forget_peak``; on the CPU, peak resident bytes.

    If ``forget_peak`` returned False, it is the peak since the process started; None if that is unknown too (Windows).
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return status_bytes("VmHWM") or _resident_ever()


def status_bytes(name: str) -> int | None:
    """A value of ``/proc/self/status`` in bytes (``VmRSS``, ``VmHWM``); None without such a file or line."""
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
