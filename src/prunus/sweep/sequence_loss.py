"""Loss of token sequences under a causal language model, as perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batch
from prunus.errors import NonFiniteError
from prunus.machine.bars import Bar
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.live import live_model
from prunus.model.loss import IGNORE_INDEX, chunked_cross_entropy, head_function, next_token_labels, perplexity_of_loss
from prunus.model.tokens import check_tokens
from prunus.option_values import check_whole
from prunus.sweep.blocks import last_hidden_states

__all__ = ["PerplexityResult", "Windows", "perplexity_of_windows", "sequence_loss"]


@dataclass(frozen=True)
class Windows:
    """Token sequences of equal length that perplexity is measured on, and where they are from.

    Attributes:
        ids: int64, (windows, seq_len), a begin-of-text token included.
        tokens: in the whole text.
        text_len: tokens of the text in each window.
        source: what they are of, for the protocol.
        left_out: what of the text is not scored, for the protocol.
        attention_mask: (windows, seq_len), 1 for a token and 0 for padding; None when nothing is padded.
    """

    ids: Tensor
    tokens: int
    text_len: int
    source: str
    left_out: str = ""
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class PerplexityResult:
    """What a model scored on a text, and how it was measured.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log likelihood of a predicted token, in nats.
        tokens: tokens in the whole text.
        windows: windows that were run.
        tokens_scored: predicted tokens, `windows * (seq_len - 1)`.
        seq_len: tokens in a window.
        protocol: the rules above in one line, with the dtype and what was left out.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    tokens_scored: int
    seq_len: int
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """What a measurement of several texts at once would have given: each predicted token counts once.

        Args:
            parts: at least one, of windows of the same length, measured by the same protocol.
        """
        scored = sum(part.tokens_scored for part in parts)
        nll = sum(part.nll * part.tokens_scored for part in parts) / scored
        return replace(
            parts[0],
            perplexity=perplexity_of_loss(nll),
            nll=nll,
            tokens=sum(part.tokens for part in parts),
            windows=sum(part.windows for part in parts),
            tokens_scored=scored,
        )


@torch.no_grad()
def perplexity_of_windows(
    model: nn.Module,
    windows: Tensor,
    attention_mask: Tensor | None = None,
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> PerplexityResult:
    """Measure a model's perplexity on token sequences of equal length, such as held-out calibration sequences.

    Args:
        model: a transformers causal language model.
        windows: int64, (windows, seq_len).
        attention_mask: (windows, seq_len), 1 for a token and 0 for padding, which is neither read nor predicted; None
            when nothing is padded.
        batch_size: windows per forward pass.
        progress: show a bar on a terminal.

    Raises:
        OptionError: the sequences are longer than the model's context, or hold token ids that it does not embed.
        NonFiniteError: the loss of a window is NaN or infinite.
    """
    model = live_model(model)
    check_whole("batch_size", batch_size)
    check_whole("seq_len", windows.shape[1], smallest=2, why="a window needs at least 2 tokens to predict one")
    check_tokens(model.config, windows)
    tokens = windows.numel() if attention_mask is None else int(attention_mask.sum())
    given = Windows(windows, tokens, windows.shape[1], "packed token sequences", attention_mask=attention_mask)
    return sequence_loss(model, given, batch_size=batch_size, progress=progress)


def sequence_loss(model: nn.Module, windows: Windows, *, batch_size: int, progress: bool) -> PerplexityResult:
    """Mean loss of windows, and how it was measured.

    Args:
        model: a transformers causal language model.
        windows: what to measure it on.
        batch_size: windows per forward pass.
        progress: show a bar on a terminal.

    Raises:
        NonFiniteError: the loss of a window is NaN or infinite.
    """
    ids, mask = windows.ids, windows.attention_mask
    number, window_len = ids.shape
    total, scored = 0.0, 0
    head = head_function(model)
    with (
        evaluation_mode(model),
        Bar("perplexity", total=number, unit="window", progress=progress) as bar,
    ):
        each_ids = ids.split(batch_size)
        masks = [None] * len(each_ids) if mask is None else mask.split(batch_size)
        batches = [Batch(*both) for both in zip(each_ids, masks, strict=True)]
        start = 0
        for batch, hidden in zip(batches, last_hidden_states(model, batches), strict=True):
            labels = next_token_labels(batch.input_ids, batch.attention_mask).to(hidden.device)
            losses = chunked_cross_entropy(hidden, head, labels)
            if not losses.isfinite().all():
                bad, text_len = start + int((~losses.isfinite()).nonzero()[0]), windows.text_len
                raise NonFiniteError(
                    f"the loss of window {bad} (tokens {bad * text_len} to {(bad + 1) * text_len - 1}) is not finite. "
                    "Check the model's weights for NaN, or load it with `dtype=bfloat16` or float32 if it overflows in "
                    "float16."
                )
            total += losses.double().sum().item()
            scored += int((labels != IGNORE_INDEX).sum())
            start += len(losses)
            bar.update(len(losses))

    nll = total / scored
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return PerplexityResult(
        perplexity=perplexity_of_loss(nll),
        nll=nll,
        tokens=windows.tokens,
        windows=number,
        tokens_scored=scored,
        seq_len=window_len,
        protocol=(
            f"{windows.source}; non-overlapping windows of {window_len}, {window_len - 1} tokens predicted in each; "
            f"{dtype} model, float32 loss{windows.left_out}"
        ),
    )
