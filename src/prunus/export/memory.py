"""Whether an export fits into the memory that may be used."""

from __future__ import annotations

from prunus.machine.byte_sizes import parse_bytes
from prunus.sweep.engine import ModelOptions, memory_needed
from prunus.sweep.estimate import Workload, check_limit

__all__ = ["check_export_memory"]


def check_export_memory(source: str, max_memory: str | None, more: int) -> None:
    """Check an estimate, which is the model itself and what is made of it at a time.

    Args:
        source: folder or Hub id of the model.
        max_memory: memory that may be used, e.g. 8GB; None = as much as there is.
        more: bytes that the export takes beside the model.

    Raises:
        OptionError: the estimate is larger, or `max_memory` is no size.
    """
    if max_memory is not None:
        limit = parse_bytes(max_memory)
        needed = memory_needed(source, ModelOptions(device="cpu"), Workload()).resident
        check_limit(needed + more, limit, "the export needs", "")
