"""How many threads compute, and what they do while they wait: so that runs beside other programs share the cores.

Libraries start as many threads as the machine has cores, though a container may have a share of them only; and a thread
that waits for the others of its pool spins on its core, which takes it from whoever could use it. Both are decided when
OpenMP is loaded, with torch, by environment variables; what the user set stays.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["cpu_quota", "share_cores"]

#: where control groups show, and the file that says which ones this process is in
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: waiting threads sleep: the standard's way of saying it, Intel's (milliseconds), and GNU's, which spin so often first:
#: some microseconds, within which the next operation of a small model mostly comes (benchmarks/RESULTS.md)
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "5000"}


def share_cores() -> None:
    """Set up the threads of this process, and of those it starts. Call it before torch is imported."""
    if not any(name in os.environ for name in SLEEPING):
        os.environ.update(SLEEPING)
    quota, cores = cpu_quota(), _cores()
    if quota is not None and quota < cores:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, math.floor(quota))))


def cpu_quota() -> float | None:
    """How many CPUs' time this process may use, by the limits of its control groups (versions 2 and 1); None = all."""
    quotas = [quota for folder in _folders() if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _folders() -> list[Path]:
    """The control groups that bound this process: its own, and all above it."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    folders = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be that of the host, whose last part shows as the root.
        root = GROUPS / controllers if (GROUPS / controllers).is_dir() else GROUPS / "cpu"
        group = root / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return folders


def _quota_of(folder: Path) -> float | None:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in files).split()
            # Without a limit: "max" in version 2, -1 in version 1.
            if float(quota) > 0 and float(period) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return None
