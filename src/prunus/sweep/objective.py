"""The loss that gradients are taken of, and its gradient by the last hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.loss import IGNORE_INDEX, sequence_losses

__all__ = ["losses_and_gradient"]


def losses_and_gradient(
    hidden: Tensor,
    head_fn: Callable[[Tensor], Tensor],
    labels: Tensor,
    sampling_seed: int | None = None,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Token losses summed per sequence, and the gradient of their total by the hidden states.

    Each chunk of positions goes through the head and straight back, so that no more than one chunk's logits exist and
    the head runs once.

    Args:
        hidden: hidden states after the final norm, (batch, seq_len, hidden_size).
        head_fn: hidden states → logits, see `prunus.loss.head_function`.
        labels: int64, (batch, seq_len), see `prunus.loss.next_token_labels`.
        sampling_seed: where there is a label, take a token drawn from the model's prediction instead; None = as it is.
        chunk: positions, over the whole batch, that have logits at a time.

    Returns:
        losses, float32 (batch,), and the gradient, of the shape and dtype of `hidden`.
    """
    batch, seq_len, _ = hidden.shape
    step = max(1, chunk // batch)
    losses = torch.zeros(batch, dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden)
    generator = None if sampling_seed is None else torch.Generator(hidden.device).manual_seed(sampling_seed)
    for start in range(0, seq_len, step):
        part = slice(start, start + step)
        leaf = hidden[:, part].detach().requires_grad_()
        with torch.enable_grad():
            logits = head_fn(leaf)
            wanted = labels[:, part] if generator is None else _draw(logits.detach(), labels[:, part], generator)
            loss = sequence_losses(logits, wanted).to(hidden.device)
            (gradient[:, part],) = torch.autograd.grad(loss.sum(), leaf)
        losses += loss.detach()
    return losses, gradient


def _draw(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens from the predicted distribution: logits (batch, positions, vocab_size) → int64 (batch, positions)."""
    probabilities = logits.float().softmax(dim=-1).flatten(0, 1).to(generator.device)
    drawn = torch.multinomial(probabilities, 1, generator=generator).view(labels.shape)
    return torch.where(labels == IGNORE_INDEX, labels, drawn)
