"""Memory of this process and of the machine, as far as a container's limit lets it be used."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["available_bytes", "resident_set"]

#: limit and use of the container's memory, by versions 2 and 1 of Linux' control groups
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def resident_set() -> int:
    """Bytes that this process has in memory now."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Bytes that can still be taken without swapping: of the machine, and within the limit of its container."""
    available = int(psutil.virtual_memory().available)
    for limit, used in CGROUPS:
        try:
            left = int(limit.read_text()) - int(used.read_text())
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        available = min(available, max(0, left))
    return available
