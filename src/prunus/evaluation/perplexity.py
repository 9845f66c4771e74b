"""Perplexity of a causal language model on a text.

Protocol: the text is tokenised once as one string, cut into non-overlapping windows of `seq_len` tokens, and in every
window each token but the first is predicted from the window's tokens before it. Perplexity is exp of the mean loss over
all predicted tokens. Where the tokenizer puts a token before every text, each window begins with it, in the place of
one of the text's, unless this is turned off. Tools that join a text's lines with blank lines first, or let windows
overlap, print other figures for the same model; the result says which protocol it followed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunus.calibration.batches import Batch
from prunus.calibration.begin_token import begin_token_of, begin_with
from prunus.errors import NonFiniteError, OptionError
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.loss import IGNORE_INDEX, chunked_cross_entropy, head_function, next_token_labels
from prunus.sweep.blocks import last_hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PerplexityResult", "perplexity", "perplexity_of_windows", "read_text"]


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


def read_text(path: str | Path) -> str:
    """Read a text file as one string, with its line ends as they are.

    Raises:
        OptionError: the file is missing, empty, a folder, or not UTF-8.
    """
    path = Path(path).expanduser()
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
    seq_len: int = 2048,
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
        seq_len: tokens per window.
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
    _check_options(model, seq_len, batch_size, max_windows)
    ids = _tokenise(tokenizer, text)
    _check_ids(model, ids)
    tokens = ids.numel()
    begin = begin_token_of(tokenizer) if begin_token else None
    length = min(seq_len - (begin is not None), tokens)
    windows = begin_with(begin, ids[: tokens - tokens % length].view(-1, length))
    left_out = f"; incomplete last window of {tokens % length} tokens dropped" if tokens % length else ""
    if max_windows is not None and max_windows < len(windows):
        left_out = f"; only the first {max_windows} of {len(windows)} windows"
        windows = windows[:max_windows]

    return _score(
        model,
        windows,
        tokens,
        "text tokenised once as one raw string (lines not re-joined), "
        + ("no special tokens" if begin is None else "each window begun with the token that begins a text"),
        left_out,
        text_len=length,
        batch_size=batch_size,
        progress=progress,
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
    _check_options(model, windows.shape[1], batch_size, None)
    _check_ids(model, windows)
    tokens = windows.numel() if attention_mask is None else int(attention_mask.sum())
    return _score(
        model,
        windows,
        tokens,
        "packed token sequences",
        "",
        text_len=windows.shape[1],
        attention_mask=attention_mask,
        batch_size=batch_size,
        progress=progress,
    )


def _score(
    model: nn.Module,
    windows: Tensor,
    tokens: int,
    source: str,
    left_out: str,
    *,
    text_len: int,
    attention_mask: Tensor | None = None,
    batch_size: int,
    progress: bool,
) -> PerplexityResult:
    window_len = windows.shape[1]
    total, scored = 0.0, 0
    head = head_function(model)
    with (
        evaluation_mode(model),
        tqdm(total=len(windows), desc="perplexity", unit="window", disable=None if progress else True) as bar,
    ):
        each_ids = windows.split(batch_size)
        masks = [None] * len(each_ids) if attention_mask is None else attention_mask.split(batch_size)
        batches = [Batch(ids, mask) for ids, mask in zip(each_ids, masks, strict=True)]
        start = 0
        for batch, hidden in zip(batches, last_hidden_states(model, batches), strict=True):
            labels = next_token_labels(batch.input_ids, batch.attention_mask).to(hidden.device)
            losses = chunked_cross_entropy(hidden, head, labels)
            if not losses.isfinite().all():
                bad = start + int((~losses.isfinite()).nonzero()[0])
                raise NonFiniteError(
                    f"the loss of window {bad} (tokens {bad * text_len} to {(bad + 1) * text_len - 1}) is not finite. "
                    "Check the model's weights for NaN, or load it with dtype bfloat16 or float32 if it overflows in "
                    "float16."
                )
            total += losses.double().sum().item()
            scored += int((labels != IGNORE_INDEX).sum())
            start += len(losses)
            bar.update(len(losses))

    nll = total / scored
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=tokens,
        windows=len(windows),
        tokens_scored=scored,
        seq_len=window_len,
        protocol=(
            f"{source}; non-overlapping windows of {window_len}, {window_len - 1} tokens predicted in each; {dtype} "
            f"model, float32 loss{left_out}"
        ),
    )


def _check_options(model: Any, seq_len: int, batch_size: int, max_windows: int | None) -> None:
    if seq_len < 2:
        raise OptionError(f"seq_len is {seq_len}: a window needs at least 2 tokens to predict one")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise OptionError(
            f"seq_len is {seq_len}, and the model knows only {longest} positions (max_position_embeddings): "
            f"use a seq_len of at most {longest}"
        )
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}: it must be at least 1")
    if max_windows is not None and max_windows < 1:
        raise OptionError(f"max_windows is {max_windows}: it must be at least 1, or None for all windows")


def _tokenise(tokenizer: Any, text: str) -> Tensor:
    # verbose=False: the whole text is longer than the model's context on purpose
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise OptionError(f"the text has {len(ids)} token(s): perplexity needs at least 2")
    return torch.tensor(ids, dtype=torch.int64)


def _check_ids(model: Any, ids: Tensor) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise OptionError(
            f"the tokenizer makes token id {int(ids.max())}, and the model embeds only {rows}: "
            "use the tokenizer that belongs to the model"
        )
