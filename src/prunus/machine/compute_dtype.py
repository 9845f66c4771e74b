"""The dtype that a model computes in here: its own, or float32 where half precision is slow.

Half precision always halves memory, but time only on processors that multiply such numbers themselves. Others convert
them one by one: on a CPU without bfloat16 instructions, products of a model's matrices take 5 to 500 times as long as
in float32. Which processors those are is not listed but measured, by the two products that most of a pass consists of.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from prunus.machine.placement import dtype_name
from prunus.machine.processes import is_first

__all__ = ["HALF", "compute_dtype"]

logger = logging.getLogger(__name__)

#: dtypes whose every number is one of float32
HALF = (torch.bfloat16, torch.float16)
#: tokens and widths of the products that are timed: wide enough to tell dtypes apart, and fast enough to be unnoticed
TOKENS, NARROWEST, WIDEST = 64, 256, 1024
#: how often each product is timed; the fastest counts, since other processes only ever add time
LEAST_ROUNDS, MOST_ROUNDS = 3, 8
#: seconds after which the least number of rounds is enough
ENOUGH = 0.2
#: how many times as long as float32 half precision may take and be kept, as it needs half the memory. Machines are far
#: from this on either side, so that noise does not decide
TOLERATED = 1.5


def compute_dtype(dtype: torch.dtype, device: torch.device, *, hidden_size: int, channels: int) -> torch.dtype:
    """A dtype to compute in, or float32 where half precision is slow; it says so once.

    Args:
        dtype: as a rule that of the checkpoint.
        device: where the model will run.
        hidden_size: width of the residual stream.
        channels: width of the MLP.
    """
    if dtype not in HALF:
        return dtype
    times = _slowdown(dtype, device, hidden_size, channels)
    if times <= TOLERATED:
        return dtype
    _say_slow(dtype_name(dtype), device.type, times)
    return torch.float32


def _slowdown(half: torch.dtype, device: torch.device, hidden_size: int, channels: int) -> float:
    """How many times as long as in float32 a model's products take; 0 or infinity where the driver knows the answer."""
    if device.type == "cuda":
        native = half != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
        return 0.0 if native else math.inf
    widths = [min(max(width, NARROWEST), WIDEST) for width in (hidden_size, channels)]
    return _measured(half, device, *widths)


@cache
def _say_slow(name: str, device: str, times: float) -> None:
    if is_first():
        how = f"take {times:.0f} × as long" if math.isfinite(times) else "are slow"
        logger.warning(
            "computing in float32: products in %s %s on this %s; `dtype=%s` overrides that", name, how, device, name
        )


@cache
def _measured(half: torch.dtype, device: torch.device, hidden_size: int, channels: int) -> float:
    """The slowdown of the slower of both products: by a weight, and by its transpose as in a backward pass."""
    generator = torch.Generator().manual_seed(0)
    weight, x, gradient = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((channels, hidden_size), (TOKENS, hidden_size), (TOKENS, channels))
    )
    try:
        with torch.no_grad(), _one_thread():
            forward = _ratio(nn.functional.linear, (x, weight), half)
            # Where it is slow forwards, a backward pass does not make up for it, and may take seconds to measure.
            return forward if forward > TOLERATED else max(forward, _ratio(torch.matmul, (gradient, weight), half))
    except (RuntimeError, TypeError):  # a device without such numbers
        return math.inf


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in this thread alone: several that wait for each other beside other programs measure those."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ratio(product: Callable[..., Tensor], factors: tuple[Tensor, Tensor], half: torch.dtype) -> float:
    """Time of a product in half precision over that in float32, each the fastest of several, taken in turn."""
    # Of a CPU, its time for this thread, which other programs do not take.
    clock = time.thread_time if factors[0].device.type == "cpu" else time.perf_counter
    best = dict.fromkeys((torch.float32, half), math.inf)
    cast = {dtype: [factor.to(dtype) for factor in factors] for dtype in best}
    for left, right in cast.values():
        product(left, right)  # libraries set themselves up
    start, ratio = clock(), math.inf
    for number in range(MOST_ROUNDS):
        for dtype, (left, right) in cast.items():
            begun = clock()
            float(product(left, right)[0, 0])  # read, so that a device has finished
            best[dtype] = min(best[dtype], clock() - begun)
        ratio = best[half] / best[torch.float32]
        if number + 1 >= LEAST_ROUNDS and (ratio <= TOLERATED or clock() - start > ENOUGH):
            break
    return ratio
