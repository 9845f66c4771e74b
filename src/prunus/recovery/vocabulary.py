r"""A part of the vocabulary, drawn anew for every batch, that stands for all of it in the loss.

The heads of both models and two softmaxes over 49152 entries are a third of the work of a training step of a small
model. For a loss of distributions p and q over the vocabulary, S a sample that holds entry v with chance π_v,

    Z̃ = Σ_{v∈S} e^{z_v} / π_v     is an unbiased estimate of     Z = Σ_v e^{z_v}

so that p̃_v = e^{z_v} / (π_v Z̃) over S stands for p, and in the same way q̃ for q. The divergence of p̃ and q̃ and its
gradient tend to those of p and q with the size of the sample; entries of the batch's own text are always in it.
The error of Z̃ is least where π_v is proportional to the root of the mean square of p_v. For an entry that is either
almost certain or almost impossible, as most of the rare ones are, that is the root of how often it occurs.

Source:
    Jean et al. 2015, "On Using Very Large Target Vocabulary for Neural Machine Translation",
    https://arxiv.org/abs/1412.2007 (importance sampling of the partition function); Z̃ is the estimator of Horvitz and
    Thompson.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["VocabularySample", "VocabularySampler"]

#: occurrences that an entry has at least: one that the text never has may be drawn, too
UNSEEN = 0.5
#: how exactly the expected size of a sample is met, relative to it
CLOSE_ENOUGH = 1e-3


@dataclass(frozen=True)
class VocabularySample:
    """Entries of the vocabulary.

    Attributes:
        entries: int64, ascending, shape (size,).
        log_chance: float32, shape (size,): log of the chance that each had to be here.
    """

    entries: Tensor
    log_chance: Tensor

    def to(self, device: torch.device) -> VocabularySample:
        """The same on a device."""
        return VocabularySample(self.entries.to(device), self.log_chance.to(device))

    def places_of(self, entries: Tensor) -> Tensor:
        """Where entries of the vocabulary are in the sample; negative ones stay as they are.

        Args:
            entries: int64, of any shape, each in the sample or negative.
        """
        places = torch.searchsorted(self.entries, entries.clamp_min(0))
        return torch.where(entries < 0, entries, places)


class VocabularySampler:
    """Draws samples.

    Args:
        input_ids: int64, the text that is trained on.
        vocab_size: entries of the vocabulary.
        size: entries of a sample, as expected.
    """

    def __init__(self, input_ids: Tensor, vocab_size: int, size: int):
        counts = torch.bincount(input_ids.flatten().cpu(), minlength=vocab_size).double()
        self._weights = counts.clamp_min(UNSEEN).sqrt()
        self._size = size

    def chances(self, input_ids: Tensor) -> Tensor:
        """The chance of each entry to be in the sample of a batch.

        Args:
            input_ids: int64, of the batch; its entries have the chance 1.

        Returns:
            float64, shape (vocab_size,). They add up to the size, or to the number of the batch's entries if that is
            larger.
        """
        certain = torch.zeros(len(self._weights), dtype=torch.bool)
        certain[input_ids.flatten().cpu()] = True
        others = self._weights[~certain]
        wanted = min(self._size - int(certain.sum()), len(others))
        chances = torch.ones_like(self._weights)
        chances[~certain] = _scaled(others, wanted)
        return chances

    def draw(self, input_ids: Tensor) -> VocabularySample:
        """A sample for a batch, by torch's random numbers of the CPU, which checkpoints keep.

        Args:
            input_ids: int64, of the batch.
        """
        chances = self.chances(input_ids)
        entries = (torch.rand(len(chances), dtype=torch.float64) < chances).nonzero().flatten()
        return VocabularySample(entries, chances[entries].log().float())


def _scaled(weights: Tensor, total: float) -> Tensor:
    """Chances min(1, s · weight) that add up to `total`."""
    if total <= 0:
        return torch.zeros_like(weights)
    scale = total / float(weights.sum())
    while True:
        chances = (scale * weights).clamp(max=1.0)
        found = float(chances.sum())
        if found >= total * (1 - CLOSE_ENOUGH):
            return chances
        scale *= total / found
