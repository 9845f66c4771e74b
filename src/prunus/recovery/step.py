"""One optimizer step: how many sequences, how far, in which dtype; what the user leaves open is decided here.

The peak learning rate of weights goes with the model's width and with the tokens of a step:

    rate = 0.35 / hidden_size · √(tokens / 2048), at most 1e-3

0.35 is 6e-4 for SmolLM2-135M in steps of 2,048 tokens, where it was measured (benchmarks/LOG.md), and 9e-5 at a width
of 4096, about the 1e-4 of Minitron for 8B (arXiv 2407.14679). The root: as tokens grow, the noise of their gradient
falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from prunus.checkpoint import fast_dtype
from prunus.errors import OptionError
from prunus.machine.compute_dtype import HALF
from prunus.machine.processes import agreed, number_of_processes
from prunus.recovery.options import RecoveryOptions

__all__ = ["Step", "peak_rate", "sequences_per_step"]

#: peak learning rate of adapters
ADAPTER_RATE = 1e-3
WEIGHT_RATE_BY_WIDTH = 0.35
TOKENS_OF_RATE = 2048
LARGEST_WEIGHT_RATE = 1e-3
#: sequences per step: the fewer, the more a token gains (benchmarks/LOG.md), and where many at once are faster, more
BATCHES = {"cpu": 1}
BATCHES_ELSEWHERE = 4
#: sequences per forward pass, at most, by kind of device
MICRO_BATCHES = {"cpu": 2}
MICRO_BATCHES_ELSEWHERE = 8


@dataclass(frozen=True)
class Step:
    """A step as it is done.

    Attributes:
        batch_size: sequences, over all processes.
        micro_batch: sequences per forward pass.
        learning_rate: at its peak.
        bfloat16: dtype of forward and backward passes; else float32.
    """

    batch_size: int
    micro_batch: int
    learning_rate: float
    bfloat16: bool

    @classmethod
    def of(cls, options: RecoveryOptions, seq_len: int, config: Any, device: torch.device) -> Step:
        """What is asked for, and for what is not, what suits a model and a machine.

        Args:
            options: what is asked for.
            seq_len: tokens per sequence.
            config: of the pruned model.
            device: where it is trained.

        Raises:
            OptionError: the sequences cannot be shared out among the processes or their forward passes.
        """
        batch = sequences_per_step(options, device.type, number_of_processes())
        rate = peak_rate(options, config.get_text_config().hidden_size, batch * seq_len)
        bfloat16 = _fast_in_bfloat16(device, config) if options.precision == "auto" else options.precision == "bfloat16"
        return cls(batch, _micro_batch(options.micro_batch, batch, device), rate, bfloat16)

    @property
    def settings(self) -> dict[str, Any]:
        """The same as fields of `RecoveryOptions`, for a record that repeats the run."""
        return {
            "batch_size": self.batch_size,
            "micro_batch": self.micro_batch,
            "learning_rate": self.learning_rate,
            "precision": "bfloat16" if self.bfloat16 else "float32",
        }


def sequences_per_step(options: RecoveryOptions, device: str, processes: int = 1) -> int:
    """The batch size, by default that for a kind of device and so many processes."""
    if options.batch_size is not None:
        return options.batch_size
    wanted, each = BATCHES.get(device, BATCHES_ELSEWHERE), processes * (options.micro_batch or 1)
    return math.ceil(wanted / each) * each


def peak_rate(options: RecoveryOptions, hidden_size: int, tokens: int) -> float:
    """The learning rate at its peak, for a model of this width and so many tokens per step."""
    if options.learning_rate is not None:
        return options.learning_rate
    if options.train == "lora":
        return ADAPTER_RATE
    return min(LARGEST_WEIGHT_RATE, WEIGHT_RATE_BY_WIDTH / hidden_size * math.sqrt(tokens / TOKENS_OF_RATE))


def _micro_batch(asked: int | None, batch_size: int, device: torch.device) -> int:
    processes = number_of_processes()
    own, left = divmod(batch_size, processes)
    if left:
        raise OptionError(f"`batch_size` is {batch_size}; it must be a multiple of the {processes} processes")
    if asked is not None:
        if own % asked:
            raise OptionError(f"`micro_batch` is {asked}; it must divide the {own} sequences per step of each process")
        return asked
    most = MICRO_BATCHES.get(device.type, MICRO_BATCHES_ELSEWHERE)
    return max(size for size in range(1, own + 1) if own % size == 0 and size <= most)


def _fast_in_bfloat16(device: torch.device, config: Any) -> bool:
    """Whether to train in bfloat16; many processes agree."""
    if config.dtype not in HALF:
        return False
    return not agreed(fast_dtype(config, torch.bfloat16, device) != torch.bfloat16)
