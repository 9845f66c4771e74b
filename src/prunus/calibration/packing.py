"""Documents → sequences of equal length, without padding.

Many documents are joined by the end-of-text token and cut every `seq_len` tokens. One long document gives
non-overlapping windows from places drawn with the seed. Either way no more is tokenised than is needed, and a token to
begin with takes the place of one of the text's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.calibration.begin_token import begin_with
from prunus.errors import CalibrationError

__all__ = ["Packed", "pack_documents", "pack_windows", "too_short"]

#: No text has more characters per token than this over any length; bounds how much of one document is tokenised.
_CHARACTERS_PER_TOKEN = 16
_DOCUMENTS_AT_A_TIME = 64


@dataclass(frozen=True)
class Packed:
    """Sequences cut from text.

    Attributes:
        input_ids: int64, shape (samples, seq_len).
        documents: how many documents went in.
    """

    input_ids: Tensor
    documents: int


def pack_documents(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    name: str,
    fewer: bool = False,
    begin: int | None = None,
) -> Packed:
    """Join documents by the end-of-text token, in the order given, and cut every `seq_len` tokens.

    Args:
        documents: read only until there are enough tokens.
        tokenizer: a transformers tokenizer; documents are tokenised without special tokens.
        samples: how many sequences.
        seq_len: tokens in each.
        name: of the source, for error messages.
        fewer: do with as many whole sequences as there are.
        begin: token that each sequence begins with.

    Raises:
        CalibrationError: there are fewer than `samples * seq_len` tokens; with `fewer`, not even one sequence.
    """
    length = seq_len - (begin is not None)
    needed = samples * length
    separator = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    remaining = (document for document in documents if document.strip())
    tokens: list[int] = []
    used = 0
    while len(tokens) < needed:
        some = _take(remaining, characters=_CHARACTERS_PER_TOKEN * (needed - len(tokens)))
        if not some:
            if fewer and len(tokens) >= length:
                samples = len(tokens) // length
                break
            raise too_short(name, len(tokens), samples, seq_len)
        for ids in _tokenise(tokenizer, some):
            if len(tokens) < needed:
                tokens += [*(separator if used else []), *ids]
                used += 1
    cut = torch.tensor(tokens[: samples * length], dtype=torch.int64).view(samples, length)
    return Packed(begin_with(begin, cut), used)


def pack_windows(
    passages: Iterable[str],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    each: int | None,
    name: str,
    fewer: bool = False,
    begin: int | None = None,
) -> Packed:
    """Cut non-overlapping windows out of passages of one document.

    Args:
        passages: non-overlapping parts of the document, in random order; or the whole of it.
        tokenizer: a transformers tokenizer; passages are tokenised without special tokens.
        samples: how many windows.
        seq_len: tokens in each.
        seed: decides which windows of a passage are taken, and their order.
        each: at most this many windows per passage; None for as many as are needed.
        name: of the source, for error messages.
        fewer: do with as many windows as there are.
        begin: token that each window begins with.

    Raises:
        CalibrationError: there are fewer than `samples` windows; with `fewer`, none.
    """
    length = seq_len - (begin is not None)
    generator = torch.Generator().manual_seed(seed)
    taken: list[Tensor] = []
    found = 0
    for passage in passages:
        (ids,) = _tokenise(tokenizer, [passage])
        found += len(ids)
        windows = torch.tensor(ids[: len(ids) - len(ids) % length], dtype=torch.int64).view(-1, length)
        order = torch.randperm(len(windows), generator=generator)
        taken.extend(windows[order[: min(each or samples, samples - len(taken))]])
        if len(taken) == samples:
            return Packed(begin_with(begin, torch.stack(taken)), 1)
    if fewer and taken:
        return Packed(begin_with(begin, torch.stack(taken)), 1)
    raise too_short(name, found, samples, seq_len)


def too_short(name: str, tokens: int, samples: int, seq_len: int) -> CalibrationError:
    """The error for a source that holds fewer tokens than asked for."""
    fits = tokens // seq_len
    advice = f"ask for at most --samples {fits}" if fits else f"ask for a --seq-len of at most {tokens}"
    if tokens < 2:
        advice = "check that this is the right file"
    return CalibrationError(
        f"the calibration text {name} is too short: it holds {tokens:,} tokens, and {samples} samples of {seq_len} "
        f"need {samples * seq_len:,}. Give more text, or {advice}."
    )


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # Text off the web holds broken characters (lone surrogates) that tokenizers refuse.
    sound = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    # verbose=False: documents longer than the model's context are cut right afterwards
    ids: list[list[int]] = tokenizer(sound, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _take(documents: Iterator[str], characters: int) -> list[str]:
    """The next few documents, no more characters in all than given: one may be larger than everything still needed."""
    taken: list[str] = []
    for document in documents:
        taken.append(document[:characters])
        characters -= len(taken[-1])
        if characters <= 0 or len(taken) == _DOCUMENTS_AT_A_TIME:
            break
    return taken
