"""What a model writes after given beginnings, drawn at temperature 1.

Source:
    LLM-QAT: Data-Free Quantization Aware Training for Large Language Models, https://arxiv.org/abs/2305.17888, section
    2.1: text for calibration that is sampled from the model that is compressed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prunus.calibration.decoding_attention import decoding_attention
from prunus.errors import NonFiniteError
from prunus.model.evaluation_mode import evaluation_mode

__all__ = ["cache_argument", "continuations", "draw_tokens", "token_cache"]


@torch.no_grad()
def continuations(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    stop: Collection[int],
    generator: torch.Generator,
    told: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Let a model continue some beginnings side by side.

    It takes one forward pass per token: an opened model reads its layers for each. The draws are made on the CPU; the
    same generator gives the same tokens on the same kind of machine, but rounding of the model's own arithmetic may
    differ on another, and with other prompts beside.

    Args:
        model: a causal language model, in memory or opened.
        prompts: int64, one vector of token ids each, with what stands before every text.
        new_tokens: after the longest prompt; shorter ones get more.
        stop: tokens that end a text. They are not part of it.
        generator: of the draws.
        told: called after each pass with the number of tokens.

    Returns:
        The prompts with what follows them, int64 on the CPU.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    length = max(map(len, prompts)) + new_tokens
    cache = {cache_argument(model): token_cache(model.config, length)}
    # Prompts are read token by token, so that none needs padding: where one has ended, the drawn token takes its place.
    tokens = torch.full((len(prompts), length), -1)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    stops = torch.tensor(sorted(stop), dtype=torch.int64)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    with evaluation_mode(model), decoding_attention(model):
        for place in range(1, length):
            read = tokens[:, place - 1 : place].to(model.device)
            output = model(input_ids=read, **cache, use_cache=True, logits_to_keep=1)
            drawn = draw_tokens(output.logits[:, -1].cpu(), generator)
            given = tokens[:, place] >= 0
            ended |= ~given & torch.isin(drawn, stops)
            tokens[:, place] = torch.where(given, tokens[:, place], drawn)
            if told is not None:
                told(len(prompts))
            if bool(ended.all()):
                break
    return [_text(row, len(prompt), stops) for row, prompt in zip(tokens, prompts, strict=True)]


class _LayerCache(DynamicLayer):
    """Keys and values of a layer in memory that is taken once: its base copies all of them for every token.

    Args:
        length: tokens that will be stored, at most.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add (sequences, heads, tokens, dimensions); all that is stored is returned, in the same shape."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._memory = [
                new.new_empty(*new.shape[:2], self.length, new.shape[3]) for new in (key_states, value_states)
            ]
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, before:after] = new
        self.keys, self.values = (memory[:, :, :after] for memory in self._memory)
        return self.keys, self.values


def token_cache(config: Any, length: int) -> DynamicCache:
    """A cache for at most so many tokens of a model with this config; layers with a window keep their own."""
    cache = DynamicCache(config=config)
    cache.layers = [_LayerCache(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _text(row: Tensor, given: int, stops: Tensor) -> Tensor:
    """A row up to the first token that ends a text, behind the prompt."""
    ends = (torch.isin(row[given:], stops) | (row[given:] < 0)).nonzero()
    return row[: given + int(ends[0])] if len(ends) else row


def cache_argument(model: Any) -> str:
    """What a model calls the argument for keys and values; transformers renames it in the course of version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each row of logits, (rows, vocabulary) → (rows,), by inverting the distribution function.

    Raises:
        NonFiniteError: logits are NaN or infinite, so that there is no distribution.
    """
    thresholds = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    drawn = []
    # Row by row: one fits into the processor's cache, and all of them in float64 take three times as long.
    for row, threshold in zip(logits, thresholds, strict=True):
        below = row.float().softmax(dim=-1).double().cumsum(dim=-1)
        if not below[-1].isfinite():
            raise NonFiniteError("the model's logits are not finite: check its weights for NaN")
        # The first token that the distribution function exceeds the threshold at: never one of probability 0.
        drawn.append(torch.searchsorted(below, threshold * below[-1], right=True).clamp_(max=len(row) - 1))
    return torch.cat(drawn)
