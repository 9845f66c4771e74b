"""The token that some tokenizers put before every text.

Llama 3, Gemma and others read it before every text they were trained on, and attention leans on it: without it, a model
is measured in a state that it is never used in, and the perplexity of Gemma 3 270M is 37.7 instead of 21.5. Sequences
that are cut out of the middle of a text begin with it, too, as they do in llama.cpp and lm-evaluation-harness.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["begin_token_of", "begin_with"]


def begin_token_of(tokenizer: Any) -> int | None:
    """The begin-of-text token, if the tokenizer puts it before a text unasked."""
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        return None
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return int(token) if whole[: 1 + len(bare)] == [token, *bare] else None


def begin_with(token: int | None, ids: Tensor) -> Tensor:
    """Put a token before each sequence: (sequences, length) → (sequences, length + 1); None changes nothing."""
    return ids if token is None else torch.cat([torch.full_like(ids[:, :1], token), ids], dim=1)
