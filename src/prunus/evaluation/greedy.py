"""Greedy decoding of a fixed number of tokens with a key/value cache, prefill and decode timed apart."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.model.evaluation_mode import evaluation_mode

__all__ = ["GreedyRun", "greedy_run"]


@dataclass(frozen=True)
class GreedyRun:
    """What a run made, and how long it took.

    Attributes:
        tokens: (batch, new_tokens), the tokens chosen.
        cache: transformers' cache after the run. The last chosen token did not go through the model.
        prefill_seconds: from the prompt to the first chosen token.
        decode_seconds: for the `new_tokens - 1` steps after it.
    """

    tokens: Tensor
    cache: Any
    prefill_seconds: float
    decode_seconds: float


@torch.no_grad()
def greedy_run(model: Any, input_ids: Tensor, new_tokens: int, attention_mask: Tensor | None = None) -> GreedyRun:
    """Continue prompts by the most likely token, again and again, past any end-of-text token.

    Args:
        model: a transformers causal language model.
        input_ids: (batch, prompt_tokens) on the model's device; shorter prompts are padded on the left.
        new_tokens: tokens to make; no fewer are made, whatever they are.
        attention_mask: 1 for a token and 0 for padding, of the shape of `input_ids`; None where nothing is padded.
    """
    device = input_ids.device
    beside = {}
    if attention_mask is not None:
        beside = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0)}
    with evaluation_mode(model):
        _wait_for(device)
        start = time.perf_counter()
        # Logits of the last position alone, as `generate` asks for them.
        out = model(input_ids, use_cache=True, logits_to_keep=1, **beside)
        chosen = [out.logits[:, -1].argmax(dim=-1, keepdim=True)]
        _wait_for(device)
        first = time.perf_counter()
        name = "cache" if "cache" in out else "past_key_values"  # renamed in transformers 5.24
        for _ in range(new_tokens - 1):
            if beside:
                mask, positions = beside["attention_mask"], beside["position_ids"]
                beside = {
                    "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
                    "position_ids": positions[:, -1:] + 1,
                }
            out = model(chosen[-1], use_cache=True, logits_to_keep=1, **{name: out[name]}, **beside)
            chosen.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
        _wait_for(device)
        end = time.perf_counter()
    return GreedyRun(torch.cat(chosen, dim=1), out[name], first - start, end - first)


def _wait_for(device: torch.device) -> None:
    """Kernels of an accelerator run on after their call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
