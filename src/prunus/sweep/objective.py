"""The loss that gradients are taken of, and its gradient by the last hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.loss import sequence_losses

__all__ = ["losses_and_gradient"]


def losses_and_gradient(
    hidden: Tensor, head_fn: Callable[[Tensor], Tensor], labels: Tensor, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Token losses summed per sequence, and the gradient of their total by the hidden states.

    Each chunk of positions goes through the head and straight back, so that no more than one chunk's logits exist and
    the head runs once.

    Args:
        hidden: hidden states after the final norm, (batch, seq_len, hidden_size).
        head_fn: hidden states → logits, see `prunus.loss.head_function`.
        labels: int64, (batch, seq_len), see `prunus.loss.next_token_labels`.
        chunk: positions, over the whole batch, that have logits at a time.

    Returns:
        losses, float32 (batch,), and the gradient, of the shape and dtype of `hidden`.
    """
    batch, seq_len, _ = hidden.shape
    step = max(1, chunk // batch)
    losses = torch.zeros(batch, dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden)
    for start in range(0, seq_len, step):
        part = slice(start, start + step)
        leaf = hidden[:, part].detach().requires_grad_()
        with torch.enable_grad():
            loss = sequence_losses(leaf, labels[:, part], head_fn)
            (gradient[:, part],) = torch.autograd.grad(loss.sum(), leaf)
        losses += loss.detach()
    return losses, gradient
