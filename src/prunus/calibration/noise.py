"""Calibration text with wrong words in it: what the dense model does where text of one kind would never lead it.

Scores say what matters on the calibration text, and repair fits the remaining weights to the inputs that they get
there; both hold for that kind of text, and far less for another. Where some tokens are replaced by ones drawn from the
whole vocabulary, blocks get inputs that the text alone would never give them: groups that only other text needs get a
score, and repair learns from the dense model what the answer to such inputs is. That is a regularisation, in the space
of tokens.

Source: Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization", Neural Computation 7(1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus.calibration import Batch
from prunus.option_values import check_share

__all__ = ["check_noise", "clean_sequences", "with_noise"]


def check_noise(name: str, share: float) -> None:
    """Raise unless an option is a share of tokens.

    Raises:
        OptionError: it is not in [0, 1].
    """
    check_share(name, share, "it is a share of the tokens")


def with_noise(batches: Sequence[Batch], share: float, vocabulary: int, seed: int = 0) -> list[Batch]:
    """Replace a share of the tokens in every second sequence by tokens drawn uniformly from the vocabulary.

    Sequences are counted over all batches, and each draws for itself, in their order: how they are batched changes
    nothing. The batches' `begin_token` stays: it stands before other text as well.

    Args:
        batches: calibration sequences.
        share: of the tokens of a noised sequence, in [0, 1]; 0 changes nothing.
        vocabulary: number of token ids to draw from.
        seed: of the draws.

    Returns:
        The same batches; the sequences in `clean_sequences` are as they were.
    """
    if not share:
        return list(batches)
    generator = torch.Generator().manual_seed(seed % 2**63)  # torch takes no larger ones
    clean = clean_sequences(sum(len(batch.input_ids) for batch in batches), share)
    noised, number = [], 0
    for batch in batches:
        ids = batch.input_ids.cpu().clone()
        for row, stays in zip(ids, _begins(batch), strict=True):
            if number not in clean:
                wrong = torch.randint(vocabulary, row.shape, generator=generator, dtype=row.dtype)
                replaced = torch.rand(row.shape, generator=generator) < share
                replaced &= ~stays
                row[replaced] = wrong[replaced]
            number += 1
        noised.append(replace(batch, input_ids=ids.to(batch.input_ids.device)))
    return noised


def clean_sequences(count: int, share: float) -> range:
    """Numbers of the sequences, of so many, that `with_noise` leaves as they are."""
    return range(0, count, 2 if share else 1)


def _begins(batch: Batch) -> Tensor:
    """True at the begin token of each sequence, behind padding: bool, (batch, seq_len)."""
    ids, mask = batch.input_ids, batch.attention_mask
    if batch.begin_token is None:
        return torch.zeros(ids.shape, dtype=torch.bool)
    first = torch.zeros(len(ids), dtype=torch.int64) if mask is None else mask.cpu().int().argmax(dim=1)
    return torch.arange(ids.shape[1]) == first[:, None]
