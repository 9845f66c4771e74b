"""From each kind of source to token sequences: one reader per kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.calibration.columns import Column
from prunus.calibration.embedded import embedded_documents
from prunus.calibration.files import json_documents, parquet_documents, text_readings
from prunus.calibration.hub import hub_documents, hub_text
from prunus.calibration.packing import Packed, pack_documents, pack_tokens, pack_windows
from prunus.calibration.self_text import self_written
from prunus.errors import CalibrationError

__all__ = ["READERS", "Reading", "Wanted", "shuffled"]


@dataclass(frozen=True)
class Reading:
    """What of a source is text, how much of it there must be, and where what is written for it is kept.

    Attributes:
        text_column: column with the text in JSON lines, parquet, and data sets given by owner and name.
        chat_column: column with conversations in place of text: lists of messages, of ShareGPT's turns, or the
            instruction of Alpaca's rows. They become text by the tokenizer's chat template, see
            `prunus.calibration.columns`.
        begin_token: where the tokenizer puts a token before every text (Llama 3, Gemma), begin each sequence with it.
        fewer: do with as many sequences as the source has, where it has fewer than asked for.
        keep: folder in which text that the model writes is kept, and found again.
    """

    text_column: str = "text"
    chat_column: str | None = None
    begin_token: bool = True
    fewer: bool = False
    keep: Path | None = None


@dataclass(frozen=True)
class Wanted:
    """The sequences that are asked for, and where their text comes from.

    Attributes:
        source: as the user wrote it, or the name of the text that ships with Python.
        path: of a file.
        column: where the text of a record is.
        tokenizer: of the model.
        samples: number of sequences.
        seq_len: tokens in each.
        seed: of the shuffling, or of the sampling.
        begin: token that begins each sequence; None for none.
        fewer: do with as many sequences as the source has.
        model: that writes the text.
        keep: folder in which what it writes is kept, and found again.
        progress: show a bar on a terminal where it takes long.
    """

    source: str
    path: Path
    column: Column
    tokenizer: Any
    samples: int
    seq_len: int
    seed: int
    begin: int | None
    fewer: bool
    model: Any
    keep: Path | None
    progress: bool

    def windows(self, readings: Iterable[tuple[Iterable[str], int | None]]) -> Packed:
        """Windows of one long text, see `pack_windows`."""
        return pack_windows(readings, self.tokenizer, seed=self.seed, **self._how)

    def documents(self, documents: Iterable[str]) -> Packed:
        """Documents, joined and cut, see `pack_documents`."""
        return pack_documents(documents, self.tokenizer, **self._how)

    def tokens(self, documents: Iterable[Tensor]) -> Packed:
        """Documents that are tokens already, joined and cut, see `pack_tokens`."""
        return pack_tokens(documents, self.tokenizer.eos_token_id, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        sizes = {"samples": self.samples, "seq_len": self.seq_len}
        return {**sizes, "name": self.source, "fewer": self.fewer, "begin": self.begin}


def shuffled(documents: Sequence[str], seed: int) -> list[str]:
    """Documents in an order drawn with a seed."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return [documents[index] for index in order]


def _from_python(wanted: Wanted) -> Packed:
    return wanted.documents(shuffled(embedded_documents(), wanted.seed))


def _from_model(wanted: Wanted) -> Packed:
    if wanted.model is None:
        raise CalibrationError(
            f"the source {wanted.source!r} has the model write text: give it as the argument `model`"
        )
    how: dict[str, Any] = {"seq_len": wanted.seq_len, "seed": wanted.seed, "begin": wanted.begin}
    written = self_written(wanted.model, wanted.tokenizer, **how, keep=wanted.keep, progress=wanted.progress)
    return wanted.tokens(document.ids for document in written)


def _from_text(wanted: Wanted) -> Packed:
    sizes = {"samples": wanted.samples, "seq_len": wanted.seq_len}
    return wanted.windows(text_readings(wanted.path, **sizes, seed=wanted.seed))


def _from_lines(wanted: Wanted) -> Packed:
    return wanted.documents(json_documents(wanted.path, column=wanted.column, seed=wanted.seed))


def _from_parquet(wanted: Wanted) -> Packed:
    return wanted.documents(parquet_documents(wanted.path, column=wanted.column, seed=wanted.seed))


def _from_hub(wanted: Wanted) -> Packed:
    text = hub_text(wanted.source, wanted.column, wanted.tokenizer)
    documents = hub_documents(text, seed=wanted.seed)
    # Lines of one running text, joined.
    return wanted.windows([(documents, None)]) if text.joiner is not None else wanted.documents(documents)


#: kind of a source → its reader
READERS: Mapping[str, Callable[[Wanted], Packed]] = {
    "embedded": _from_python,
    "model": _from_model,
    "text": _from_text,
    "jsonl": _from_lines,
    "parquet": _from_parquet,
    "hub": _from_hub,
}
