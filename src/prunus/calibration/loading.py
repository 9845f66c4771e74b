"""From what a user wrote for a calibration source to token sequences with provenance."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.calibration.batches import Calibration, Provenance, hash_tokens
from prunus.calibration.begin_token import begin_token_of
from prunus.calibration.columns import ChatColumn, column_of
from prunus.calibration.embedded import embedded_name
from prunus.calibration.files import TEXT_KINDS
from prunus.calibration.hub import HUB_NAMES, hub_text
from prunus.calibration.packing import Packed, pack_documents, pack_windows
from prunus.calibration.prompts import VERSION
from prunus.calibration.reading import READERS, Reading, Wanted, shuffled
from prunus.calibration.sources import MIXTURES, Source, mixed, read_sources, sequences_of
from prunus.errors import CalibrationError, OptionError, TextTooShortError
from prunus.files.user_path import expanded
from prunus.option_values import check_seed, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_SOURCE",
    "SELF_SOURCE",
    "calibration_from_texts",
    "calibration_from_tokens",
    "chat_column_of",
    "check_sources",
    "kind_of",
    "load_calibration",
]

#: the text that ships with Python, see `prunus.calibration.embedded`
DEFAULT_SOURCE = "default"
#: text that the model writes, see `prunus.calibration.sampled`
SELF_SOURCE = "self"

#: more than any text here has, and few enough to be held
MOST_TOKENS = 2**33
#: kinds of sources whose records have columns
RECORD_KINDS = ("jsonl", "parquet", "hub")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")


def load_calibration(
    source: str | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    reading: Reading | None = None,
    model: PreTrainedModel | None = None,
    progress: bool = True,
) -> Calibration:
    """Make `samples` sequences of `seq_len` tokens from a source of text.

    Documents are shuffled with the seed, tokenised without special tokens, joined by the end-of-text token and cut
    into sequences of `seq_len` tokens: no padding. A source that is one long text gives non-overlapping windows from
    places drawn with the seed instead. No more is read and tokenised than is needed. The same source, tokenizer and
    options give the same tokens in every process.

    Args:
        source: None or `default` for the text that ships with Python; `self` for text the model writes; a `.txt`,
            `.md`, `.jsonl`, `.json` or `.parquet` file; one of `HUB_NAMES` or `owner/name[:config[:split]]` for a data
            set of the hub; `mixture` for four of these. Several of them, `["FILE:2", "self"]`, share the sequences by
            weight, see `prunus.calibration.sources`.
        tokenizer: of the model that will be calibrated.
        samples: number of sequences.
        seq_len: tokens in each.
        seed: of the shuffling, and of the sampling for `self`.
        reading: which column is text or conversations, what a sequence begins with, and where text for `self` is kept.
        model: needed only for `self`.
        progress: show a bar on a terminal where it takes long (`self`).

    Raises:
        OptionError: `samples` or `seq_len` is out of range; conversations, and a tokenizer without a chat template.
        TextTooShortError: the source has fewer tokens than asked for.
        CalibrationError: the source is missing, unreadable, of an unknown kind, or has no such column.
    """
    check_counts(samples, seq_len)
    check_seed("seed", seed)
    sources = read_sources(DEFAULT_SOURCE if source is None else source)
    reading = reading or Reading()
    check_sources(sources, reading.chat_column)
    how: dict[str, Any] = {"seq_len": seq_len, "seed": seed, "model": model}
    parts = []
    for index, (one, number) in enumerate(zip(sources, sequences_of(sources, samples), strict=True)):
        try:
            own = replace(reading, chat_column=chat_column_of(one, reading.chat_column))
            parts.append(_loaded(one.name, tokenizer, number, **how, reading=own, progress=progress))
        except TextTooShortError as error:
            if len(sources) == 1 or not error.sequences:
                raise
            fitting = range(samples - 1, len(sources) - 1, -1)
            most = next((all_ for all_ in fitting if sequences_of(sources, all_)[index] <= error.sequences), None)
            fewer = "" if most is None else f", at most {most} `samples` in all"
            raise TextTooShortError(
                f"the calibration text {one.name} has {error.sequences} sequences, and its share of {samples} "
                f"`samples` is {number}. Give more of it, a smaller weight{fewer}, or other text",
                error.sequences,
            ) from error
    return mixed(parts)


def _loaded(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    *,
    seq_len: int,
    seed: int,
    reading: Reading,
    model: PreTrainedModel | None,
    progress: bool,
) -> Calibration:
    """The sequences of one source."""
    kind = kind_of(source)
    name = embedded_name() if kind == "embedded" else str(source)
    column = column_of(reading.text_column, reading.chat_column, tokenizer)
    if kind == "hub":
        column = hub_text(name, column, tokenizer).column
    path, begin = expanded(name), begin_token_of(tokenizer) if reading.begin_token else None
    which: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "seed": seed, "begin": begin}
    wanted = Wanted(
        name, path, column, tokenizer, **which, fewer=reading.fewer, model=model, keep=reading.keep, progress=progress
    )
    try:
        packed = READERS[kind](wanted)
    except OSError as error:
        raise CalibrationError(f"cannot read the calibration text {name}: {error.strerror or error}") from error
    own_text = f"written by the model, prompts {VERSION}"
    shown = {"model": own_text, **dict.fromkeys(TEXT_KINDS.values(), path.name)}.get(kind, name)
    return _calibration(packed, shown, "chat" if isinstance(column, ChatColumn) else kind, seed, begin_token=begin)


def calibration_from_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    source: str = "texts",
    begin_token: bool = True,
    fewer: bool = False,
) -> Calibration:
    """Make calibration sequences from texts in memory, by the rules of `load_calibration`.

    Args:
        texts: documents; a single one (or a plain string) counts as one long text.
        tokenizer: of the model that will be calibrated.
        samples: number of sequences.
        seq_len: tokens in each.
        seed: of the shuffling.
        source: a name for the provenance.
        begin_token: where the tokenizer puts a token before every text, begin each sequence with it.
        fewer: do with as many sequences as the texts have, where they have fewer than `samples`.

    Raises:
        OptionError: `samples` or `seq_len` is out of range.
        CalibrationError: the texts are too short, or not texts.
    """
    check_counts(samples, seq_len)
    check_seed("seed", seed)
    documents = [texts] if isinstance(texts, str) else list(texts)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise CalibrationError(
                f"calibration text {index} is a {type(document).__name__}, not a string. For token ids use "
                "calibration_from_tokens."
            )
    how: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "name": repr(source), "fewer": fewer}
    begin = begin_token_of(tokenizer) if begin_token else None
    how["begin"] = begin
    if len(documents) == 1:
        packed = pack_windows([(documents, None)], tokenizer, seed=seed, **how)
    else:
        packed = pack_documents(shuffled(documents, seed), tokenizer, **how)
    return _calibration(packed, source, "texts", seed, begin_token=begin)


def calibration_from_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    source: str = "tokens",
    begin_token: int | None = None,
) -> Calibration:
    """Use ready token sequences as calibration data, padded ones too.

    Args:
        input_ids: integers, shape (samples, seq_len).
        attention_mask: shape (samples, seq_len), 1 (or True) for a token and 0 for padding, on either side; None when
            nothing is padded.
        source: a name for the provenance.
        begin_token: the token that each sequence begins with because the tokenizer puts it before every text: noise
            leaves it in place.

    Raises:
        CalibrationError: a shape or type is wrong, a sequence has fewer than two tokens, or one begins with another
            token than `begin_token`.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.numel() == 0:
        raise CalibrationError(
            "calibration tokens must be integers of shape (samples, seq_len), and these are "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise CalibrationError(
            f"the attention mask has shape {tuple(attention_mask.shape)}, the tokens have {tuple(input_ids.shape)}: "
            "they must be equal"
        )
    ids = input_ids.detach().to("cpu", torch.int64)
    mask = attention_mask.detach().to("cpu").bool().long() if attention_mask is not None else None
    if mask is not None and bool(mask.all()):
        mask = None
    lengths = mask.sum(dim=1) if mask is not None else torch.full((len(ids),), ids.shape[1])
    if int(lengths.min()) < 2:
        raise CalibrationError(
            f"calibration sequence {int(lengths.argmin())} has {int(lengths.min())} token(s) that are not padding: "
            "each needs at least 2, one to predict the other"
        )
    if begin_token is not None:
        first = torch.zeros(len(ids), dtype=torch.int64) if mask is None else mask.argmax(dim=1)
        others = (ids.gather(1, first[:, None]).flatten() != begin_token).nonzero().flatten()
        if len(others):
            number = int(others[0])
            raise CalibrationError(
                f"calibration sequence {number} begins with token {int(ids[number, first[number]])}, not with "
                f"`begin_token` {begin_token}"
            )
    return _calibration(Packed(ids, len(ids)), source, "tokens", None, mask, begin_token)


def _calibration(
    packed: Packed,
    source: str,
    kind: str,
    seed: int | None,
    attention_mask: Tensor | None = None,
    begin_token: int | None = None,
) -> Calibration:
    ids = packed.input_ids
    provenance = Provenance(
        source=source,
        kind=kind,
        seed=seed,
        samples=len(ids),
        seq_len=ids.shape[1],
        tokens=ids.numel() if attention_mask is None else int(attention_mask.sum()),
        documents=packed.documents,
        sha256=hash_tokens(ids, attention_mask),
    )
    return Calibration(ids, provenance, attention_mask, begin_token=begin_token)


def check_sources(sources: Sequence[Source], chat_column: str | None) -> None:
    """Check that there are such sources, and that a column of conversations is that of one of them at least.

    How much text they hold is known when it is read.

    Raises:
        CalibrationError: there is no such file or name; the columns of all sources are known, or they have none.
    """
    for source in sources:
        kind_of(source.name)
    if chat_column is None or any(chat_column_of(source, chat_column) for source in sources):
        return
    names = " and ".join(source.name for source in sources)
    if all(source.name in HUB_NAMES for source in sources):
        raise CalibrationError(
            f"`chat_column` is {chat_column!r}, and the columns of {names} are known: leave it out, or name the data "
            "set itself as owner/name"
        )
    raise CalibrationError(
        f"conversations come from .jsonl, .json, .parquet or a data set of the hub, and {names} is neither; leave "
        "`chat_column` out, or give one of these"
    )


def chat_column_of(source: Source, chat_column: str | None) -> str | None:
    """The column of conversations that is named, for one source of several.

    None for one that has no columns (text, what the model writes), or a data set whose columns are known.
    """
    has_columns = kind_of(source.name) in RECORD_KINDS and source.name not in HUB_NAMES
    return chat_column if has_columns else None


def check_counts(samples: int, seq_len: int) -> None:
    """Check how many sequences are asked for, and of how many tokens.

    Raises:
        OptionError: no whole numbers, too few, or more tokens than can be held.
    """
    check_whole("samples", samples, why="calibration needs at least one sequence")
    check_whole("seq_len", seq_len, smallest=2, why="a calibration sequence needs at least 2 tokens to predict one")
    if samples * seq_len > MOST_TOKENS:
        raise OptionError(
            f"`samples` {samples:,} and `seq_len` {seq_len:,} make {samples * seq_len:,} tokens; the most is "
            f"{MOST_TOKENS:,}"
        )


def kind_of(source: str | None) -> str:
    """The kind of a source, a key of `READERS`.

    Raises:
        CalibrationError: there is no such source.
    """
    if source is None or source == DEFAULT_SOURCE:
        return "embedded"
    if source == SELF_SOURCE:
        return "model"
    if source in HUB_NAMES:
        return "hub"
    path = expanded(source)
    extensions = ", ".join(TEXT_KINDS)
    if path.is_dir():
        raise CalibrationError(f"the calibration source {source!r} is a folder. Give one file in it ({extensions}).")
    if path.is_file():
        if kind := TEXT_KINDS.get(path.suffix.lower()):
            return kind
        raise CalibrationError(
            f"the calibration file {source!r} has the extension {path.suffix!r}, and prunus reads {extensions}. "
            "Convert it, or rename it if it holds one of these."
        )
    if path.suffix.lower() in TEXT_KINDS:
        raise CalibrationError(f"the calibration file {source!r} does not exist. Check the path.")
    if not _HUB_NAME.fullmatch(source):
        names = [DEFAULT_SOURCE, SELF_SOURCE, *MIXTURES, *HUB_NAMES]
        close = difflib.get_close_matches(source, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise CalibrationError(
            f"there is no calibration source {source!r}: no such file, and not one of the names {', '.join(names)}."
            f"{hint} Give a file ({extensions}), one of these names, or owner/name of a data set on the hub."
        )
    return "hub"
