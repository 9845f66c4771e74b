"""Text that the model writes itself: for calibration where there is none, and for repair beside what there is.

Whatever text a model was trained on, what it writes is of all kinds of it.

Source:
    LLM-QAT: Data-Free Quantization Aware Training for Large Language Models, https://arxiv.org/abs/2305.17888, section
    2.1: text sampled from the model that is compressed, from first tokens drawn from the whole vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prunus.calibration.begin_token import begin_with
from prunus.errors import NonFiniteError
from prunus.machine.bars import Bar
from prunus.model.evaluation_mode import evaluation_mode

__all__ = ["PIECES_AT_ONCE", "PIECE_LENGTH", "cache_argument", "draw_tokens", "sample_from_model"]

#: tokens that are written from one first token; a token costs the more, the more tokens stand before it
PIECE_LENGTH = 256
#: pieces that are written side by side
PIECES_AT_ONCE = 64


@torch.no_grad()
def sample_from_model(
    model: Any, *, samples: int, seq_len: int, seed: int, begin: int | None = None, progress: bool = True
) -> Tensor:
    """Sequences drawn from the model at temperature 1.

    They are cut from pieces of at most `PIECE_LENGTH` tokens, one after the other, each of which starts from a token
    drawn uniformly from the vocabulary. It takes one forward pass per token of a piece, for `PIECES_AT_ONCE` pieces at
    a time. The draws are made on the CPU; the same seed gives the same tokens on the same kind of machine, but rounding
    of the model's own arithmetic may differ on another.

    Args:
        model: a transformers causal language model.
        samples: how many sequences.
        seq_len: tokens in each.
        seed: of the draws.
        begin: token that each sequence begins with; all pieces are written behind it.
        progress: show a bar on a terminal.

    Returns:
        int64 on the CPU, shape (samples, seq_len).

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    wanted = seq_len - (begin is not None)
    length = min(wanted, PIECE_LENGTH)
    pieces = -(-samples * wanted // length)
    vocabulary = model.config.get_text_config().vocab_size
    cache_name = cache_argument(model)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(vocabulary, (pieces, 1), generator=generator)
    written: list[Tensor] = []
    bar = Bar("writing text", total=pieces * length, unit="token", progress=progress)
    with evaluation_mode(model), bar:
        for first in starts.split(PIECES_AT_ONCE):
            tokens, cache = [first], {cache_name: DynamicCache()}
            bar.update(len(first))
            read = begin_with(begin, first)
            for _ in range(length - 1):
                output = model(input_ids=read.to(model.device), **cache, use_cache=True, logits_to_keep=1)
                tokens.append(draw_tokens(output.logits[:, -1].float().cpu(), generator))
                read = tokens[-1]
                bar.update(len(first))
            written.append(torch.cat(tokens, dim=1))
    return begin_with(begin, torch.cat(written).flatten()[: samples * wanted].view(samples, wanted))


def cache_argument(model: Any) -> str:
    """What a model calls the argument for keys and values; transformers renames it in the course of version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each row of logits, (rows, 1), by inverting the distribution function: one draw per row."""
    if not logits.isfinite().all():
        raise NonFiniteError("the model's logits are not finite: check its weights for NaN")
    below = logits.softmax(dim=-1).double().cumsum(dim=-1)
    threshold = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * below[:, -1:]
    # The first token that the distribution function exceeds the threshold at: never one of probability 0.
    return torch.searchsorted(below, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
