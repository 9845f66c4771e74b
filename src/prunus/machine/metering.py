"""How long a stage takes and how much memory it needs at its peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = ["Cost", "metered"]

#: the meters that run: one inside another would make it forget what was before
_running: list[Cost] = []
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(eq=False)
class Cost:
    """What a stage took.

    Attributes:
        seconds: wall-clock time.
        peak_bytes: largest memory in use during the stage: of the CUDA allocator if the stage runs on CUDA, else the
            resident set of the process. None where the system does not say.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def metered(device: torch.device | str = "cpu") -> Iterator[Cost]:
    """Measure the time and the peak memory of what runs inside the context.

    Args:
        device: where the work is done.

    Yields:
        The cost; it is complete when the context ends.
    """
    device = torch.device(device)
    for outer in _running:
        outer.peak_bytes = _larger(outer.peak_bytes, _peak(device))
    cost = Cost()
    _reset_peak(device)
    _running.append(cost)
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - start
        cost.peak_bytes = _larger(cost.peak_bytes, _peak(device))
        _running.remove(cost)


def _larger(one: int | None, other: int | None) -> int | None:
    return max((peak for peak in (one, other) if peak is not None), default=None)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_REFS.write_text("5")  # Linux: forget the high-water mark of the resident set
    except OSError:
        return


def _peak(device: torch.device) -> int | None:
    """Largest memory in use: since the reset on CUDA and Linux, elsewhere since the process began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return getattr(psutil.Process().memory_info(), "peak_wset", None)
