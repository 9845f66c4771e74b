r"""The training loss, without the logits of all tokens in memory at once.

With a vocabulary of 49152 the float32 logits of 4096 tokens take 800 MB, and a distillation loss would need them for
two models, with log-softmax and gradients on top. Here the heads of both models run on a few hundred tokens at a time.
The gradient of each piece by its hidden states (and by the head, if that is trained) is taken at once, in the forward
pass, so that nothing of a piece is kept and, unlike with activation checkpointing, nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunus.model.loss import IGNORE_INDEX
from prunus.recovery.vocabulary import VocabularySample

__all__ = ["BeforeHead", "TokenWeights", "token_loss"]

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenWeights:
    """What the loss of a token is made of.

    Attributes:
        kl: a, of the distillation loss.
        ce: b, of the next-token loss.
        temperature: T, of both distributions in the distillation loss.
    """

    kl: float = 0.0
    ce: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class BeforeHead:
    """A model's output before its head, which gives logits a piece at a time.

    Attributes:
        hidden: hidden states after the final norm, shape (batch, seq_len, hidden_size).
        head: hidden states → logits.
        trained: parameters of `head` that are trained, or parts of them. They get their gradient in the loss, and must
            not be reached through `head` in any other way.
    """

    hidden: Tensor
    head: Head
    trained: Sequence[Tensor] = ()


def token_loss(
    student: BeforeHead,
    labels: Tensor,
    weights: TokenWeights,
    teacher: BeforeHead | None = None,
    chunk: int = 256,
    sample: VocabularySample | None = None,
) -> Tensor:
    r"""Distillation and next-token loss, each a mean over tokens.

        L = a · T² · mean_t KL(q_t ‖ p_t) + b · mean_t -log p_t[label_t]

    with p the model's and q the dense model's distribution, in the first term both at temperature T. All positions
    count in the first term, those with a label in the second. Softmax is in float32 whatever dtype the logits have.

    Args:
        student: the model's output.
        labels: int64, shape (batch, seq_len), see `prunus.model.loss.next_token_labels`.
        weights: a, b and T.
        teacher: the dense model's output; needed where a is not 0.
        chunk: tokens at a time. It changes memory, and the result only by rounding.
        sample: the entries of the vocabulary that both heads give logits for, where these are not all. Every label is
            one of them. The loss is then an estimate, see `prunus.recovery.vocabulary`.

    Returns:
        float32 scalar. Differentiable by the student's `hidden` and `trained`, once.

    Source:
        Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531 (with T²).
    """
    flat_labels = labels.flatten()
    positions, predicted = flat_labels.numel(), int((flat_labels != IGNORE_INDEX).sum())
    flat_teacher = None if teacher is None else teacher.hidden.detach().flatten(0, 1)
    temperature = weights.temperature
    if sample is not None:
        sample = sample.to(flat_labels.device)
        flat_labels = sample.places_of(flat_labels)

    def log_softmax(logits: Tensor) -> Tensor:
        # An entry that is here with a chance of one in ten stands for ten like it.
        return functional.log_softmax(logits if sample is None else logits - sample.log_chance, dim=-1)

    def loss_of(part: Tensor, where: slice) -> Tensor:
        logits = student.head(part).float()
        total = logits.new_zeros(())
        if weights.ce and predicted:
            losses = functional.nll_loss(
                log_softmax(logits), flat_labels[where], ignore_index=IGNORE_INDEX, reduction="sum"
            )
            total = total + losses * (weights.ce / predicted)
        if weights.kl:
            assert teacher is not None
            assert flat_teacher is not None
            with torch.no_grad():
                target = log_softmax(teacher.head(flat_teacher[where]).float() / temperature)
            own = log_softmax(logits / temperature)
            divergence = functional.kl_div(own, target, reduction="sum", log_target=True)
            total = total + divergence * (weights.kl * temperature**2 / positions)
        return total

    loss: Tensor = _ByChunks.apply(loss_of, chunk, student.hidden.flatten(0, 1), *student.trained)
    return loss


class _ByChunks(torch.autograd.Function):
    """A sum of losses over pieces of the rows of a tensor, with its gradient taken piece by piece on the way."""

    @staticmethod
    def forward(
        ctx: Any, loss_of: Callable[[Tensor, slice], Tensor], chunk: int, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        """The sum; gradients by `hidden` (rows, hidden_size) and `parameters` wait for the backward pass."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = any(ctx.needs_input_grad)
        by_hidden = torch.empty_like(hidden) if wanted else hidden
        by_parameters = [torch.zeros_like(parameter) for parameter in parameters] if wanted else []
        for start in range(0, len(hidden), chunk):
            where = slice(start, start + chunk)
            part = hidden[where].detach()
            if not wanted:
                total += loss_of(part, where)
                continue
            with torch.enable_grad():
                part.requires_grad_()
                loss = loss_of(part, where)
            by_hidden[where], *others = torch.autograd.grad(loss, [part, *parameters])
            for gathered, gradient in zip(by_parameters, others, strict=True):
                gathered += gradient
            total += loss.detach()
        if wanted:
            ctx.save_for_backward(by_hidden, *by_parameters)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """The gradients that waited, times the scalar that came from outside."""
        return None, None, *(gradient * outer[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
