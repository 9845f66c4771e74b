"""Calibration text that the model writes itself.

Source:
    LLM-QAT: Data-Free Quantization Aware Training for Large Language Models, https://arxiv.org/abs/2305.17888, samples
    from the model being compressed when no data is at hand.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from prunus.errors import CalibrationError, NonFiniteError
from prunus.evaluation.mode import evaluation_mode

__all__ = ["sample_from_model"]


@torch.no_grad()
def sample_from_model(
    model: Any, tokenizer: Any, *, samples: int, seq_len: int, seed: int, batch_size: int = 32, progress: bool = True
) -> Tensor:
    """Sequences drawn from the model at temperature 1, starting from one token.

    The first token is the begin-of-text token, or the end-of-text token where there is none. It takes one forward pass
    per token: for a small model on a CPU, minutes. The draws are made on the CPU in float32; the same seed gives the
    same tokens on the same kind of machine, but rounding of the model's own arithmetic may differ on another.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        samples: how many sequences.
        seq_len: tokens in each, the first one counted.
        seed: of the draws.
        batch_size: sequences written at a time.
        progress: show a bar on a terminal.

    Returns:
        int64 on the CPU, shape (samples, seq_len).

    Raises:
        CalibrationError: the tokenizer has neither a begin-of-text nor an end-of-text token.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise CalibrationError(
            "text cannot be sampled from the model: its tokenizer has neither a begin-of-text nor an end-of-text token "
            "to start from. Give a calibration text."
        )
    # transformers renames this argument in the course of version 5.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    generator = torch.Generator().manual_seed(seed)
    written: list[Tensor] = []
    bar = tqdm(total=samples * seq_len, desc="sampling text", unit="token", disable=None if progress else True)
    with evaluation_mode(model), bar:
        for first in range(0, samples, batch_size):
            size = min(batch_size, samples - first)
            sequences = [torch.full((size, 1), int(start), dtype=torch.int64)]
            cache = {cache_name: DynamicCache()}
            for _ in range(seq_len - 1):
                output = model(input_ids=sequences[-1].to(model.device), **cache, use_cache=True, logits_to_keep=1)
                logits = output.logits[:, -1].float().cpu()
                if not logits.isfinite().all():
                    raise NonFiniteError("the model's logits are not finite: check its weights for NaN")
                sequences.append(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))
                bar.update(size)
            written.append(torch.cat(sequences, dim=1))
    return torch.cat(written)
