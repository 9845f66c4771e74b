"""Text → token ids in bounded memory, and whether a model can read them.

A tokenizer takes some 150 bytes of memory per character while it works, so long texts are tokenised in pieces that
overlap. Two neighbouring pieces are joined where both make the same tokens of the text around the joint. A tokenizer
whose decision depends on what lies further off than the agreeing tokens could still differ from the text tokenised
whole; none is known that does. Where the pieces agree nowhere in their overlap (a run of one character), and where a
tokenizer does not say which characters a token is made of (those written in Python), the text is tokenised whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.errors import OptionError

__all__ = ["check_seq_len", "check_token_ids", "check_tokens", "longest_context", "token_ids"]

#: characters of a piece, and of what it shares with the next
PIECE, OVERLAP = 2**16, 2**11
#: tokens on both sides of a joint that both pieces must agree on
AGREEING = 8


def token_ids(tokenizer: Any, texts: Sequence[str], enough: int | None = None) -> list[Tensor]:
    """Tokenise texts without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        texts: what to tokenise.
        enough: of a long text no more is tokenised than gives this many tokens; None for all of it.

    Returns:
        int64, one vector for each text.
    """
    # Text off the web holds broken characters (lone surrogates) that tokenizers refuse.
    sound = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    # The first piece is as long as the tokens of ordinary text, and a small multiple more.
    piece = PIECE if enough is None else max(2 * OVERLAP, min(PIECE, 8 * enough))
    cut = [getattr(tokenizer, "is_fast", False) and len(text) > 2 * piece for text in sound]
    whole = iter(_encode(tokenizer, [text for text, long in zip(sound, cut, strict=True) if not long]))
    return [
        _ids_in_pieces(tokenizer, text, piece, enough) if long else torch.tensor(next(whole)[0], dtype=torch.int64)
        for text, long in zip(sound, cut, strict=True)
    ]


def longest_context(config: Any) -> int | None:
    """The positions that a model knows; None where its config does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if longest is None else int(longest)


def check_seq_len(config: Any, seq_len: int, name: str = "seq_len") -> None:
    """Check that a model knows as many positions as a sequence has tokens.

    Args:
        config: of the model.
        seq_len: tokens of a sequence.
        name: of the option that says so.

    Raises:
        OptionError: it does not.
    """
    longest = longest_context(config)
    if longest is not None and seq_len > longest:
        raise OptionError(
            f"`{name}` is {seq_len}, and the model knows only {longest} positions (max_position_embeddings): give at "
            f"most {longest}"
        )


def check_token_ids(config: Any, ids: Tensor) -> None:
    """Check that a model embeds all tokens.

    Args:
        config: of the model.
        ids: integers of any shape.

    Raises:
        OptionError: there is an id that the embedding has no row for.
    """
    rows = int(config.get_text_config().vocab_size)
    if not ids.numel():
        return
    smallest, largest = (int(end) for end in torch.aminmax(ids))
    if smallest < 0 or largest >= rows:
        raise OptionError(
            f"the tokenizer makes token id {largest if largest >= rows else smallest}, and the model embeds only "
            f"{rows}: use the tokenizer that belongs to the model; where tokens were added to it, resize the model "
            "(resize_token_embeddings) and save it again"
        )


def check_tokens(config: Any, ids: Tensor, name: str = "seq_len") -> None:
    """Check that a model can read token sequences: no longer than its context, and all tokens embedded.

    Args:
        config: of the model.
        ids: (sequences, seq_len).
        name: of the option that says how long they are.

    Raises:
        OptionError: it cannot.
    """
    check_seq_len(config, ids.shape[1], name)
    check_token_ids(config, ids)


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], Any]]:
    """The ids of each text, with what a fast tokenizer says of them beside."""
    if not texts:
        return []
    # verbose=False: texts longer than the model's context are cut right afterwards
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    encodings = getattr(encoded, "encodings", None) or [None] * len(texts)
    return list(zip(encoded["input_ids"], encodings, strict=True))


def _ids_in_pieces(tokenizer: Any, text: str, piece: int, enough: int | None) -> Tensor:
    """The ids of a text; its pieces are `piece` characters long at first, later `PIECE`."""
    start, stop, first = 0, piece, 0
    ((ids, encoding),) = _encode(tokenizer, [text[:stop]])
    joined: list[Tensor] = []
    while stop < len(text):
        sure = _tokens_before(encoding, stop - OVERLAP - start)
        if enough is not None and sum(map(len, joined)) + sure - first >= enough:
            ids = ids[:sure]  # the last tokens of a piece may be cut off
            break
        piece = min(2 * piece, PIECE)
        later_start, stop = stop - OVERLAP, min(stop - OVERLAP + piece, len(text))
        ((later_ids, later_encoding),) = _encode(tokenizer, [text[later_start:stop]])
        joint = _joint(ids, encoding, later_ids, later_encoding, later_start - start)
        if joint is None:
            return torch.tensor(_encode(tokenizer, [text])[0][0], dtype=torch.int64)
        joined.append(torch.tensor(ids[first : joint[0]], dtype=torch.int64))
        start, ids, encoding, first = later_start, later_ids, later_encoding, joint[1]
    return torch.cat([*joined, torch.tensor(ids[first:], dtype=torch.int64)])


def _tokens_before(encoding: Any, position: int) -> int:
    """How many tokens a piece makes of its first characters; none where they all belong to one."""
    found = (encoding.char_to_token(place) for place in range(position, 0, -1))
    return next((token for token in found if token is not None), 0)


def _joint(
    ids: list[int], encoding: Any, later_ids: list[int], later_encoding: Any, shift: int
) -> tuple[int, int] | None:
    """A place in the overlap where two pieces make the same tokens: its token in each; None if there is none.

    Args:
        ids: of the earlier piece.
        encoding: what the tokenizer says of it.
        later_ids: of the later piece.
        later_encoding: what the tokenizer says of it.
        shift: where the later piece starts in the earlier one.
    """
    middle = OVERLAP // 2
    for distance in range(middle):
        for position in (middle + distance, middle - distance):
            here, there = encoding.char_to_token(shift + position), later_encoding.char_to_token(position)
            if here is None or there is None or min(here, there) < AGREEING:
                continue
            around = ids[here - AGREEING : here + AGREEING]
            if len(around) < 2 * AGREEING or around != later_ids[there - AGREEING : there + AGREEING]:
                continue
            # The same tokens of the same characters: a repeated word agrees with itself elsewhere as well.
            if encoding.token_to_chars(here)[0] == shift + later_encoding.token_to_chars(there)[0]:
                return here, there
    return None
