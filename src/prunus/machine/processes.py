"""Many processes that share out the calibration sequences, started by torchrun.

Every process has the whole model (or opens it), takes every n-th batch, and adds what its statistics accumulated for a
layer to that of the others before the layer is finished. All of them then hold the same numbers; the first one writes.
"""

from __future__ import annotations

import os
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
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
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
