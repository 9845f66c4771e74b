"""Many processes that share out the calibration sequences, started by torchrun.

Every process has the whole model (or opens it), takes every n-th batch, and adds what its statistics accumulated for a
layer to that of the others before the layer is finished. All of them then hold the same numbers; the first one writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from prunus.errors import OptionError

__all__ = [
    "add_up_",
    "agreed",
    "is_first",
    "joined",
    "launched",
    "number_of_processes",
    "rank",
    "share",
    "wait_for_all",
]

T = TypeVar("T")


def launched() -> int:
    """How many processes torchrun started; 1 without it.

    Raises:
        OptionError: one of the variables by which torchrun tells a process its place holds no such number.
    """
    processes = _from_environment("WORLD_SIZE", 1, smallest=1)
    for name in ("RANK", "LOCAL_RANK"):
        number = _from_environment(name, 0, smallest=-1)  # -1 is how launchers say that there is one process only
        if number >= processes:
            raise OptionError(f"{name} is {number} and WORLD_SIZE {processes}; numbers of processes begin with 0")
    return processes


def _from_environment(name: str, default: int, smallest: int) -> int:
    """A number that a launcher set; one that is there but empty is none, as for a variable that is not there."""
    text = os.environ.get(name, "").strip()
    if not text:
        os.environ.pop(name, None)  # torch and transformers would take it for a number
        return default
    if not re.fullmatch(r"-?[0-9]{1,6}", text) or int(text) < smallest:
        raise OptionError(
            f"the environment variable {name} is {text[:40]!r}, and torchrun sets it to a whole number from {smallest} "
            f"on; start processes by torchrun, or unset {name}"
        )
    return int(text)


def number_of_processes() -> int:
    """How many processes have joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if number_of_processes() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the context lasts; without torchrun, nothing.

    CPU tensors are added up by gloo, CUDA tensors by nccl.
    """
    if launched() == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(max(0, _from_environment("LOCAL_RANK", 0, smallest=-1)))
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise OptionError(
            f"WORLD_SIZE is {launched()}, but {missing[0]} is not set: start processes by torchrun, or unset WORLD_SIZE"
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th item, beginning at this process' own number.

    Raises:
        OptionError: there are fewer items than processes.
    """
    if len(items) < number_of_processes():
        raise OptionError(
            f"{number_of_processes()} processes cannot share {len(items)} calibration batches; start fewer, or give "
            "more sequences or a smaller batch size"
        )
    return items[rank() :: number_of_processes()]


def add_up_(tensors: Sequence[tuple[Tensor, str]]) -> None:
    """Add tensors of all processes up in place, or take their maximum.

    Args:
        tensors: each with `sum` or `max`; the same, in the same order, in every process.
    """
    if number_of_processes() > 1:
        for tensor, operation in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)


def wait_for_all() -> None:
    """Go on when all processes have come this far."""
    if number_of_processes() > 1:
        dist.barrier()


def agreed(value: bool) -> bool:
    """Whether any of the processes says so: all have the same answer, though only one may know."""
    answer = torch.tensor([float(value)])
    add_up_([(answer, "max")])
    return bool(answer)
