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
from prunus.errors import TextTooShortError
from prunus.model.tokens import token_ids

__all__ = ["Packed", "pack_documents", "pack_tokens", "pack_windows", "too_short"]

#: How many documents are tokenised together: about as much text as is needed still, taken at this many characters per
#: token. What is missing then is taken from the next ones.
_CHARACTERS_PER_TOKEN = 16
_DOCUMENTS_AT_A_TIME = 64
#: So many more passages may be too short for a window than not: one of blanks is no sign of a language.
_PASSAGES_WITHOUT = 8


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
        TextTooShortError: there are fewer than `samples * seq_len` tokens; with `fewer`, not even one sequence.
    """
    enough = samples * (seq_len - (begin is not None))

    def encoded() -> Iterator[Tensor]:
        remaining = (document for document in documents if document.strip())
        found = 0
        while some := _take(remaining, characters=_CHARACTERS_PER_TOKEN * (enough - found)):
            for ids in token_ids(tokenizer, some, enough=enough - found):
                found += len(ids)
                yield ids

    sizes = {"samples": samples, "seq_len": seq_len}
    return pack_tokens(encoded(), tokenizer.eos_token_id, **sizes, name=name, fewer=fewer, begin=begin)


def pack_tokens(
    documents: Iterable[Tensor],
    separator: int | None,
    *,
    samples: int,
    seq_len: int,
    name: str,
    fewer: bool = False,
    begin: int | None = None,
) -> Packed:
    """`pack_documents` of documents that are tokens.

    Args:
        documents: int64 vectors; read only until there are enough tokens.
        separator: token between two documents; None for none.
        samples: how many sequences.
        seq_len: tokens in each.
        name: of the source, for error messages.
        fewer: do with as many whole sequences as there are.
        begin: token that each sequence begins with.

    Raises:
        TextTooShortError: see `pack_documents`.
    """
    length = seq_len - (begin is not None)
    needed = samples * length
    between = torch.tensor([] if separator is None else [int(separator)], dtype=torch.int64)
    tokens: list[Tensor] = []
    found = used = 0
    for ids in documents:
        tokens += [between, ids] if used else [ids]
        found += len(ids) + len(between) * bool(used)
        used += 1
        if found >= needed:
            break
    else:
        if not (fewer and found >= length):
            raise too_short(name, found, 1 if fewer else samples, length)
        samples = found // length
    cut = torch.cat(tokens)[: samples * length].view(samples, length)
    return Packed(begin_with(begin, cut), used)


def pack_windows(
    readings: Iterable[tuple[Iterable[str], int | None]],
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    name: str,
    fewer: bool = False,
    begin: int | None = None,
) -> Packed:
    """Cut non-overlapping windows out of passages of one document.

    Args:
        readings: non-overlapping parts of the document, in random order, or the whole of it, with the number of windows
            that are taken of each at most (None: as many as are needed). Where more of them are too short for a window
            than not, or where they are too few, the next reading is begun, of longer parts.
        tokenizer: a transformers tokenizer; passages are tokenised without special tokens.
        samples: how many windows.
        seq_len: tokens in each.
        seed: decides which windows of a passage are taken, and their order.
        name: of the source, for error messages.
        fewer: do with as many windows as there are.
        begin: token that each window begins with.

    Raises:
        TextTooShortError: there are fewer than `samples` windows; with `fewer`, none.
    """
    length = seq_len - (begin is not None)
    taken: list[Tensor] = []
    found = 0
    for passages, each in readings:
        generator = torch.Generator().manual_seed(seed)
        taken, found, without = [], 0, 0
        for passage in passages:
            (ids,) = token_ids(tokenizer, [passage])
            found += len(ids)
            windows = ids[: len(ids) - len(ids) % length].view(-1, length)
            order = torch.randperm(len(windows), generator=generator)
            taken.extend(windows[order[: min(each or samples, samples - len(taken))]])
            if len(taken) == samples:
                return Packed(begin_with(begin, torch.stack(taken)), 1)
            without += not len(windows)
            if each is not None and without > len(taken) + _PASSAGES_WITHOUT:
                break
    if fewer and taken:
        return Packed(begin_with(begin, torch.stack(taken)), 1)
    raise too_short(name, found, 1 if fewer else samples, length)


def too_short(name: str, tokens: int, samples: int, length: int) -> TextTooShortError:
    """The error for a source that holds fewer tokens than asked for, `length` of its own in each sequence.

    A token that sequences begin with is none of its own.
    """
    fits = tokens // length
    advice = f"ask for at most {fits} `samples`" if fits else f"ask for a `seq_len` of at most {tokens}"
    if tokens < 2:
        advice = "check that this is the right file"
    return TextTooShortError(
        f"the calibration text {name} is too short: it holds {tokens:,} tokens, and {samples} "
        f"sample{'s' * (samples != 1)} with {length} of them each need {samples * length:,}. Give more text, or "
        f"{advice}.",
        fits,
    )


def _take(documents: Iterator[str], characters: int) -> list[str]:
    """The next few documents, no more than the one that fills up so many characters."""
    taken: list[str] = []
    for document in documents:
        taken.append(document)
        characters -= len(taken[-1])
        if characters <= 0 or len(taken) == _DOCUMENTS_AT_A_TIME:
            break
    return taken
