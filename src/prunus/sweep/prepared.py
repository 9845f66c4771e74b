"""Calibration batches checked and labelled, ready for either engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.calibration.batches import Batch
from prunus.errors import CalibrationError, NonFiniteError
from prunus.model.loss import IGNORE_INDEX, next_token_labels

__all__ = ["PreparedBatch", "check_losses", "prepare"]


@dataclass(frozen=True)
class PreparedBatch:
    """One batch with what it has to predict.

    Attributes:
        batch: the tokens.
        first: number of its first sequence among all calibration sequences.
        labels: int64, (batch, seq_len), see `prunus.model.loss.next_token_labels`.
        targets: int64, (batch,): tokens of each sequence that have a loss.
        sampling_seeds: predict tokens drawn from the model's own predictions instead of the text's, with this seed for
            each sequence; None = the text's.
    """

    batch: Batch
    first: int
    labels: Tensor
    targets: Tensor
    sampling_seeds: tuple[int, ...] | None = None

    def on(self, device: torch.device | str) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids on a device, and what a model is called with beside them."""
        return self.batch.input_ids.to(device), self.batch.mask_arguments(device)


def prepare(batches: Sequence[Batch], sampling_seed: int | None = None) -> list[PreparedBatch]:
    """Label batches.

    Args:
        batches: the tokens.
        sampling_seed: draw what has to be predicted from the model, with a seed of its own for every sequence.

    Raises:
        CalibrationError: there are none, or a sequence has no token to predict.
    """
    if not batches:
        raise CalibrationError("there are no calibration batches; give at least one sequence")
    prepared, first = [], 0
    for batch in batches:
        labels = next_token_labels(batch.input_ids, batch.attention_mask)
        targets = (labels != IGNORE_INDEX).sum(dim=1)
        if bool((targets == 0).any()):
            raise CalibrationError(
                f"calibration sequence {first + int((targets == 0).nonzero()[0])} has no token to predict; "
                "every sequence needs at least two tokens"
            )
        last, seeds = first + len(batch.input_ids), None
        if sampling_seed is not None:
            seeds = tuple((sampling_seed * 1_000_003 + sequence) % 2**63 for sequence in range(first, last))
        prepared.append(PreparedBatch(batch, first, labels, targets, seeds))
        first = last
    return prepared


def check_losses(losses: Tensor, prepared: PreparedBatch, culprit: Callable[[], str]) -> None:
    """Raise if a loss is not finite.

    Args:
        losses: float32, (batch,).
        prepared: the batch they are of.
        culprit: says where in the model it went wrong; called only if it did.

    Raises:
        NonFiniteError: naming the sequence and the culprit.
    """
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        number = int(bad[0])
        raise NonFiniteError(
            f"the loss of calibration sequence {prepared.first + number} is {float(losses[number])}: {culprit()}. "
            "Load the model in bf16 or fp32; fp16 overflows easily."
        )
