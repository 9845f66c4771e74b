"""Perplexity of a causal language model on a text.

Protocol: the text is tokenised once as one string, cut into non-overlapping windows of `seq_len` tokens, and in every
window each token but the first is predicted from the window's tokens before it. Perplexity is exp of the mean loss over
all predicted tokens. Where the tokenizer puts a token before every text, each window begins with it, in the place of
one of the text's, unless this is turned off. Tools that join a text's lines with blank lines first, or let windows
overlap, print other figures for the same model; the result says which protocol it followed.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunus.calibration.begin_token import begin_token_of, begin_with
from prunus.errors import OptionError
from prunus.files.user_path import expanded
from prunus.model.live import live_model
from prunus.model.tokens import check_seq_len, check_tokens, longest_context, token_ids
from prunus.option_values import check_whole
from prunus.sweep.sequence_loss import PerplexityResult, Windows, sequence_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_SEQ_LEN",
    "cut_text",
    "perplexity",
    "perplexity_of_text",
    "read_text",
    "warn_of_few_tokens",
    "window_length",
]

logger = logging.getLogger(__name__)

#: tokens of a window, where the model has as many positions
DEFAULT_SEQ_LEN = 2048
#: losses of single tokens spread by about so many nats around their mean
SPREAD_OF_A_LOSS = 2.5
#: below so many tokens a figure is uncertain by 8 % and more: nobody should rank models by it unawares
FEW_TOKENS = 1000


def read_text(path: str | Path) -> str:
    """Read a text file as one string, with its line ends as they are.

    Raises:
        OptionError: the file is missing, empty, a folder, or not UTF-8.
    """
    path = expanded(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text ({error}). Convert it to UTF-8 first.") from error
    except OSError as error:
        raise OptionError(f"cannot read the text file {path}: {error.strerror or error}") from error
    if not text:
        raise OptionError(f"the text file {path} is empty: give a text of at least two tokens")
    return text


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    seq_len: int | None = None,
    batch_size: int = 1,
    max_windows: int | None = None,
    begin_token: bool = True,
    progress: bool = True,
) -> PerplexityResult:
    """Measure a model's perplexity on a text.

    The model runs in its own dtype and in evaluation mode; every module's mode is put back afterwards. Log-softmax and
    loss are float32, the sum over windows float64. Tokens after the last whole window are
    left out; a text shorter than one window is scored as one shorter window.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        text: the text as one string, e.g. from `read_text`.
        seq_len: tokens per window; None for 2048, or as many as the model has positions for if those are fewer.
        batch_size: windows per forward pass.
        max_windows: only the first so many windows; None for all.
        begin_token: where the tokenizer puts a token before every text (Llama 3, Gemma), begin each window with it.
            False is how GPTQ and the tools after it measure.
        progress: show a bar on a terminal.

    Raises:
        OptionError: an option is out of range (`seq_len` beyond the model's `max_position_embeddings`), the text has
            fewer than two tokens, or the tokenizer's ids do not fit the model.
        NonFiniteError: the loss of a window is NaN or infinite.
    """
    model = live_model(model)
    check_whole("batch_size", batch_size)
    seq_len = window_length(model.config, seq_len)
    windows = cut_text(tokenizer, text, seq_len=seq_len, max_windows=max_windows, begin_token=begin_token)
    return perplexity_of_text(model, windows, batch_size=batch_size, progress=progress)


def window_length(config: Any, seq_len: int | None, name: str = "seq_len") -> int:
    """Tokens of a window: as asked for, else 2048 or what the model has positions for.

    Args:
        config: of the model.
        seq_len: what was asked for.
        name: of the option that says so.

    Raises:
        OptionError: fewer than two, or more than the model has positions for.
    """
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, longest_context(config) or DEFAULT_SEQ_LEN)
    check_whole(name, seq_len, smallest=2, why="a window needs at least 2 tokens to predict one")
    check_seq_len(config, seq_len, name)
    return seq_len


def cut_text(
    tokenizer: Any, text: str, *, seq_len: int, max_windows: int | None = None, begin_token: bool = True
) -> Windows:
    """Tokenise a text and cut it into windows, by the protocol above.

    Args:
        tokenizer: of the model that will be measured.
        text: the text as one string.
        seq_len: tokens per window, from `window_length`.
        max_windows: only the first so many windows; None for all.
        begin_token: begin each window with the token that the tokenizer puts before every text.

    Raises:
        OptionError: the text has fewer than two tokens, or an option is out of range.
    """
    if max_windows is not None:
        check_whole("max_windows", max_windows, why="leave it out for all windows")
    (ids,) = token_ids(tokenizer, [text])
    if (tokens := len(ids)) < 2:
        raise OptionError(f"the text has {tokens} token(s): perplexity needs at least 2")
    begin = begin_token_of(tokenizer) if begin_token else None
    length = min(seq_len - (begin is not None), tokens)
    windows = begin_with(begin, ids[: tokens - tokens % length].view(-1, length))
    left_out = f"; incomplete last window of {tokens % length} tokens dropped" if tokens % length else ""
    if max_windows is not None and max_windows < len(windows):
        left_out = f"; only the first {max_windows} of {len(windows)} windows"
        windows = windows[:max_windows]
    source = "text tokenised once as one raw string (lines not re-joined), "
    source += "no special tokens" if begin is None else "each window begun with the token that begins a text"
    return Windows(windows, tokens, length, source, left_out)


def warn_of_few_tokens(name: str, predicted: int) -> None:
    """Say what a perplexity on so few predicted tokens is worth, if that is little.

    Args:
        name: of the text.
        predicted: tokens whose loss is measured.
    """
    if predicted < FEW_TOKENS:
        logger.warning(
            "perplexity on %s is the mean over %d tokens only, so that it is uncertain by a factor of about %.2g; give "
            "more text to compare models by",
            name,
            predicted,
            math.exp(SPREAD_OF_A_LOSS / math.sqrt(predicted)),
        )


@torch.no_grad()
def perplexity_of_text(
    model: nn.Module, windows: Windows, *, batch_size: int = 1, progress: bool = True
) -> PerplexityResult:
    """Measure a model's perplexity on a text that was cut before, see `perplexity`.

    Args:
        model: a transformers causal language model.
        windows: from `cut_text`, by the model's own tokenizer.
        batch_size: windows per forward pass.
        progress: show a bar on a terminal.

    Raises:
        OptionError: the windows are longer than the model's context, or hold token ids that it does not embed.
        NonFiniteError: the loss of a window is NaN or infinite.
    """
    check_whole("batch_size", batch_size)
    check_tokens(model.config, windows.ids)
    return sequence_loss(model, windows, batch_size=batch_size, progress=progress)
