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

import torch

from prunus.calibration import Batch
from prunus.calibration.begin_token import shared_begin_token
from prunus.errors import OptionError

__all__ = ["check_noise", "clean_batches", "with_noise"]


def check_noise(name: str, share: float) -> None:
    """Raise unless an option is a share of tokens.

    Raises:
        OptionError: it is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise OptionError(f"{name} is {share}; it is a share of the tokens and must lie in [0, 1]")


def with_noise(batches: Sequence[Batch], share: float, vocabulary: int, seed: int = 0) -> list[Batch]:
    """Replace a share of the tokens in every second batch by tokens drawn uniformly from the vocabulary.

    A token that all sequences begin with stays: it stands before other text as well.

    Args:
        batches: calibration sequences; a single batch of several sequences is parted first.
        share: of the tokens of a noised batch, in [0, 1]; 0 changes nothing.
        vocabulary: number of token ids to draw from.
        seed: of the draws.

    Returns:
        As many sequences, in the order they had; the batches in `clean_batches` are those without noise.
    """
    if not share:
        return list(batches)
    batches = _parted(batches)
    begun = shared_begin_token(torch.cat([batch.input_ids[:, :1] for batch in batches])) is not None
    generator = torch.Generator().manual_seed(seed)
    clean, noised = clean_batches(len(batches), share), []
    for number, batch in enumerate(batches):
        if number in clean:
            noised.append(batch)
            continue
        ids = batch.input_ids
        wrong = torch.randint(vocabulary, ids.shape, generator=generator, dtype=ids.dtype).to(ids.device)
        replaced = (torch.rand(ids.shape, generator=generator) < share).to(ids.device)
        replaced[:, : int(begun)] = False
        noised.append(Batch(torch.where(replaced, wrong, ids), batch.attention_mask))
    return noised


def clean_batches(count: int, share: float) -> range:
    """Numbers of the batches, of so many, that `with_noise` leaves as they are."""
    return range(0, count, 2 if share else 1)


def _parted(batches: Sequence[Batch]) -> Sequence[Batch]:
    if len(batches) > 1 or len(batches[0].input_ids) < 2:
        return batches
    ids, mask = batches[0].input_ids, batches[0].attention_mask
    half = -(-len(ids) // 2)
    masks = (None, None) if mask is None else mask.split(half)
    return [Batch(part, its) for part, its in zip(ids.split(half), masks, strict=True)]
