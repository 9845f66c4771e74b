"""The loss that gradients are taken of, and its gradient by the last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunus.model.loss import IGNORE_INDEX

__all__ = ["losses_and_gradient"]


def losses_and_gradient(
    hidden: Tensor,
    head_fn: Callable[[Tensor], Tensor],
    labels: Tensor,
    sampling_seeds: Sequence[int] | None = None,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Token losses summed per sequence, and the gradient of their total by the hidden states.

    Each chunk of positions goes through the head and straight back, so that no more than one chunk's logits exist and
    the head runs once.

    Args:
        hidden: hidden states after the final norm, (batch, seq_len, hidden_size).
        head_fn: hidden states → logits, see `prunus.model.loss.head_function`.
        labels: int64, (batch, seq_len), see `prunus.model.loss.next_token_labels`.
        sampling_seeds: where there is a label, take a token drawn from the model's prediction instead, with a seed of
            its own for each sequence; None = as it is.
        chunk: positions, over the whole batch, that have logits at a time.

    Returns:
        losses, float32 (batch,), and the gradient, of the shape and dtype of `hidden`.
    """
    batch, seq_len, _ = hidden.shape
    step = max(1, chunk // batch)
    losses = torch.zeros(batch, dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden)
    thresholds = None if sampling_seeds is None else _thresholds(sampling_seeds, seq_len).to(hidden.device)
    for start in range(0, seq_len, step):
        part = slice(start, start + step)
        leaf = hidden[:, part].detach().requires_grad_()
        with torch.enable_grad():
            logits = head_fn(leaf)
        wanted = labels[:, part]
        if thresholds is not None:
            wanted = _draw(logits.detach(), wanted, thresholds[:, part])
        part_losses, by_logits = _cross_entropy(logits.detach(), wanted.to(logits.device))
        (gradient[:, part],) = torch.autograd.grad(logits, leaf, by_logits.to(logits.dtype))
        losses += part_losses.to(hidden.device)
    return losses, gradient


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses summed per sequence, float32 (batch,), and the gradient of their total by the logits, float32.

    The gradient is softmax(logits) - onehot(label), written into the memory of the log-probabilities: autograd takes as
    much again and goes over it twice more, which is what the loss costs where the vocabulary is large.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    counted = labels != IGNORE_INDEX
    target = labels.where(counted, 0)[..., None]
    losses = -log_probabilities.gather(-1, target).squeeze(-1) * counted
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(-1, target, torch.full_like(target, -1.0, dtype=gradient.dtype))
    gradient.masked_fill_(~counted[..., None], 0.0)
    return losses.sum(dim=1), gradient


def _thresholds(seeds: Sequence[int], seq_len: int) -> Tensor:
    """A draw from [0, 1) for each position, float32 (batch, seq_len), whatever the batch and the chunks."""
    return torch.stack([torch.rand(seq_len, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _draw(logits: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """Tokens from the predicted distribution, by inverting its distribution function.

    Args:
        logits: (batch, positions, vocab_size).
        labels: int64, (batch, positions); those that are not counted stay.
        thresholds: from [0, 1), (batch, positions).
    """
    below = logits.float().softmax(dim=-1).cumsum(dim=-1)
    # The first token that the distribution function exceeds the threshold at: never one of probability 0.
    drawn = torch.searchsorted(below, thresholds[..., None].to(below.device) * below[..., -1:], right=True)
    drawn = drawn.squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    return torch.where(labels == IGNORE_INDEX, labels, drawn.to(labels.device))
