"""Attention for one new token at a time on a CPU, several times as fast as what torch does there.

torch's kernel for CPUs takes each query head by itself and reads the keys of its group again for it. The query heads of
a group see the same keys: given as so many queries of one head, they are a small matrix product, and the result is the
same but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["decoding_attention"]

SDPA, NAME = "sdpa", "prunus_decoding"


@contextmanager
def decoding_attention(model: Any) -> Iterator[None]:
    """Let a model on a CPU that attends by torch's `sdpa` do so in this way; every other model stays as it is."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before != SDPA or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: queries (batch, heads, tokens, size), keys and values (batch, groups, …)."""
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    by_head = attention_mask is not None and attention_mask.shape[1] > 1
    unusual = options.get("dropout") or any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if tokens > 1 or by_head or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(batch, groups, heads // groups, size)
    # A new token sees all that is stored, but for what the mask hides: nothing is causal in it.
    output = functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling")
    )
    return output.reshape(batch, tokens, heads, value.shape[-1]), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
