"""The next-token loss of a causal language model, without its logits in memory all at once.

With 2048 positions and a vocabulary of 49152 the float32 logits of one sequence take 400 MB, and autograd would keep
several copies of them. Only the hidden states are kept here; the head runs on a few positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["IGNORE_INDEX", "chunked_cross_entropy", "head_function", "next_token_labels", "perplexity_of_loss"]

#: label of a position that predicts nothing
IGNORE_INDEX = -100
#: nats; exp of a little more is no number of double precision, and infinity is none that JSON has
_LARGEST_LOSS = 709.0


def next_token_labels(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What each position has to predict: the token after it.

    Args:
        input_ids: int64, shape (batch, seq_len).
        attention_mask: shape (batch, seq_len), 1 for a token and 0 for padding; None when nothing is padded.

    Returns:
        int64, shape (batch, seq_len). `IGNORE_INDEX` at the last position, and wherever the position itself or the
        token after it is padding.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        real = attention_mask.bool()
        labels[:, :-1].masked_fill_(~(real[:, :-1] & real[:, 1:]), IGNORE_INDEX)
    return labels


def head_function(model: nn.Module, project: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """How a model turns the hidden states after its final norm into logits.

    Besides the output embedding this applies what some families' configs ask for on top: `logits_scaling` (a divisor),
    `logit_scale` (a factor) and `final_logit_softcapping`.

    Args:
        model: a transformers causal language model.
        project: in place of the output embedding, such as a part of it.

    Returns:
        Hidden states of shape (…, hidden_size) → logits of shape (…, vocab_size), in the model's dtype.
    """
    loose: Any = model
    head = loose.get_output_embeddings() if project is None else project
    config = loose.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    softcap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        values: Tensor = head(hidden)
        if divisor is not None:
            values = values / divisor
        if factor is not None:
            values = values * factor
        if softcap is not None:
            values = torch.tanh(values / softcap) * softcap
        return values

    return logits


@torch.no_grad()
def chunked_cross_entropy(
    hidden: Tensor, head_fn: Callable[[Tensor], Tensor], labels: Tensor, chunk: int = 512
) -> Tensor:
    """Sum of the token losses of every sequence.

    L_b = -Σ_t log softmax(head_fn(hidden_bt))[labels_bt] over the positions whose label is not `IGNORE_INDEX`, with the
    softmax in float32 whatever dtype the logits have. The mean over tokens is this sum divided by
    `(labels != IGNORE_INDEX).sum()`.

    Args:
        hidden: hidden states after the final norm, shape (batch, seq_len, hidden_size).
        head_fn: hidden states → logits, see `head_function`.
        labels: int64, shape (batch, seq_len): the token that each position predicts, see `next_token_labels`.
        chunk: how many positions (over the whole batch) get logits at a time. It changes memory, and the result only
            by rounding.

    Returns:
        float32, shape (batch,); without a gradient, which `prunus.sweep.objective` and training compute themselves.
    """
    batch, seq_len, _ = hidden.shape
    step = max(1, chunk // batch)
    total = torch.zeros(batch, dtype=torch.float32, device=hidden.device)
    for start in range(0, seq_len, step):
        part = hidden[:, start : start + step], labels[:, start : start + step]
        total += _chunk_losses(*part, head_fn)
    return total


def _chunk_losses(hidden: Tensor, labels: Tensor, head_fn: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head_fn(hidden)
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view(labels.shape).sum(dim=1).to(hidden.device)


def perplexity_of_loss(loss: float) -> float:
    """Exp of a mean loss per token in nats; of a loss that is beyond measure, the largest there is."""
    return math.exp(min(loss, _LARGEST_LOSS))
