"""How many bytes of keys and values a model keeps, by arithmetic from its shape."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from prunus.model.geometry import Geometry

__all__ = ["kv_cache_bytes"]


def kv_cache_bytes(model: Any, tokens: int, batch_size: int = 1) -> int:
    """Bytes of keys and values in transformers' dynamic cache once it has seen `tokens` tokens of each sequence.

    A layer keeps `2 * num_key_value_heads * head_dim` numbers per token, in the model's dtype; with a sliding window of
    `w` it keeps the last `w - 1` tokens only. A layer whose attention was cut away keeps two numbers per token, by
    which the cache counts tokens.

    Args:
        model: a transformers causal language model, pruned or not. Its weights may be on the meta device.
        tokens: tokens that went through the model, prompt and answer together.
        batch_size: sequences that are kept at a time.

    Raises:
        UnsupportedModelError: the family is not described.
    """
    geometry = Geometry.of(model)
    # An empty cache holds no memory; which layers slide is transformers' decision, not ours to repeat.
    kinds = DynamicCache(config=model.config).layers
    numbers = 0
    for widths, kind in zip(geometry.widths, kinds, strict=True):
        kept = min(tokens, kind.sliding_window - 1) if kind.is_sliding else tokens
        numbers += kept * 2 * (widths.num_key_value_heads * geometry.head_dim or 1)
    return numbers * batch_size * model.dtype.itemsize
