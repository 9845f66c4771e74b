"""How many sequences go through a model at a time, where the user leaves it open; results depend on it by rounding.

On CUDA, as many as fit by the estimate, in powers of two. Elsewhere one: a pass over one sequence of 512 tokens keeps
all cores of a CPU busy, larger batches only move more memory, and the command line computes what a call in Python does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from prunus.sweep.estimate import Workload

__all__ = ["chosen_batch_size"]

#: tokens of a pass beyond which a GPU computes no faster
TOKENS_ON_CUDA = 2**14


def chosen_batch_size(workload: Workload, device: torch.device, fits: Callable[[int], bool]) -> int:
    """Sequences per pass.

    Args:
        workload: sequences and their length; its own batch size is not read.
        device: where the model runs.
        fits: whether a job of so many sequences per pass stays within memory.
    """
    most = TOKENS_ON_CUDA // max(workload.seq_len, 1) if device.type == "cuda" else 1
    size = 1
    while 2 * size <= min(most, workload.sequences) and fits(2 * size):
        size *= 2
    return size
