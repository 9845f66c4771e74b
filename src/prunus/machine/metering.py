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

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
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
    cost, on_cuda = Cost(), torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if on_cuda:
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - start
        cost.peak_bytes = torch.cuda.max_memory_allocated(device) if on_cuda else _peak()


def _reset_peak() -> None:
    try:
        _CLEAR_REFS.write_text("5")  # Linux: forget the high-water mark of the resident set
    except OSError:
        return


def _peak() -> int | None:
    """High-water mark of the resident set: since the reset on Linux, elsewhere since the process began."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return getattr(psutil.Process().memory_info(), "peak_wset", None)
