"""Calibration data once it is tokens: the sequences, where they came from, and how they are handed out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunus.errors import CalibrationError, OptionError
from prunus.model.digest import digest_tensors
from prunus.option_values import check_whole

__all__ = ["Batch", "Calibration", "Provenance", "digest_batches", "hash_tokens"]

#: a sequence is of the same text as another where they have a run of so many tokens in common
SHARED = 32
#: a run of tokens in more sequences than these is of no text in particular
COMMON = 8
#: odd, and large enough that runs of a few tokens differ in all bits
_FACTOR = 6364136223846793005


@dataclass(frozen=True)
class Batch:
    """Some calibration sequences.

    Attributes:
        input_ids: int64, shape (batch, seq_len).
        attention_mask: int64, shape (batch, seq_len), 1 for a token and 0 for padding; None when nothing is padded.
        source: which of the calibration's sources all of them are of, counted from 0.
        begin_token: the token that each begins with because the tokenizer puts it before every text; None without.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    source: int = 0
    begin_token: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def mask_arguments(self, device: torch.device | str) -> dict[str, Tensor]:
        """What a model is called with beside the ids: the mask, and positions that padding does not count in.

        As in `generate`. Most families see only how far tokens are apart, but some see where they are: Ministral 3
        scales queries by position, and Hunyuan has norms behind the rotation.
        """
        if self.attention_mask is None:
            return {}
        mask = self.attention_mask.to(device)
        return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@dataclass(frozen=True)
class Provenance:
    """Where calibration tokens came from: enough to make them again, and to see whether they are the same.

    Attributes:
        source: name of the source; of a file only its last part, never its place on a machine.
        kind: `text`, `jsonl`, `parquet`, `hub`, `embedded`, `model`, `texts`, `tokens`, `chat` for conversations, or
            `mixture` of several sources.
        seed: what decided the order of documents and windows; None where nothing was drawn.
        samples: number of sequences.
        seq_len: tokens in a sequence.
        tokens: tokens in all sequences, padding not counted.
        documents: documents that were used; None where the source has none.
        sha256: hash of the token ids (and of the mask, if anything is padded).
        part: `all`, or which side of `Calibration.split` this is.
        sources: of a mixture, where the sequences of each source came from.
    """

    source: str
    kind: str
    seed: int | None
    samples: int
    seq_len: int
    tokens: int
    documents: int | None
    sha256: str
    part: str = "all"
    sources: tuple[Provenance, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; `sources` only of a mixture."""
        values = {name: value for name, value in asdict(self).items() if name != "sources"}
        return {**values, "sources": [source.to_dict() for source in self.sources]} if self.sources else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Read back what `to_dict` wrote.

        Raises:
            CalibrationError: a field is missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        required = known - {"part", "sources"}
        if (missing := required - values.keys()) or (values.keys() - known):
            raise CalibrationError(
                f"this is not the provenance of calibration data: missing {sorted(missing)}, "
                f"unknown {sorted(values.keys() - known)}"
            )
        return cls(**{**values, "sources": tuple(cls.from_dict(source) for source in values.get("sources", ()))})

    def of_part(self, ids: Tensor, mask: Tensor | None, part: str) -> Provenance:
        """The same for some of the sequences.

        Args:
            ids: (samples, seq_len).
            mask: of the same shape; None when nothing is padded.
            part: see the attribute.
        """
        tokens = ids.numel() if mask is None else int(mask.sum())
        return replace(self, samples=len(ids), tokens=tokens, sha256=hash_tokens(ids, mask), part=part)


@dataclass(frozen=True)
class Calibration:
    """The token sequences that statistics are taken on.

    Attributes:
        input_ids: int64 on the CPU, shape (samples, seq_len).
        provenance: where they came from.
        attention_mask: int64, shape (samples, seq_len), 1 for a token and 0 for padding; None when nothing is padded,
            which is always so for calibration made from text.
        sources: int64, shape (samples,): the source of each sequence, counted from 0; None where there is one. See
            `prunus.calibration.sources`.
        begin_token: the token that each sequence begins with because the tokenizer puts it before every text; None
            without.
    """

    input_ids: Tensor
    provenance: Provenance
    attention_mask: Tensor | None = None
    sources: Tensor | None = None
    begin_token: int | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def each_source(self) -> list[Calibration]:
        """The sequences of each source by themselves; of one source, all."""
        if self.sources is None:
            return [self]
        return [
            replace(self._part(self.sources == number, self.provenance.part), provenance=provenance, sources=None)
            for number, provenance in enumerate(self.provenance.sources)
            if provenance.samples
        ]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The sequences in order, `batch_size` at a time; of several sources, one source after the other.

        The last batch of a source may be smaller.

        Raises:
            OptionError: `batch_size` is below 1.
        """
        check_whole("batch_size", batch_size)
        # Checked here, not in a generator: the error must come with the call, not with the first batch.
        return chain.from_iterable(
            source._batches(number, batch_size) for number, source in enumerate(self.each_source())
        )

    def _batches(self, source: int, batch_size: int) -> Iterator[Batch]:
        masks = self.attention_mask.split(batch_size) if self.attention_mask is not None else None
        for number, ids in enumerate(self.input_ids.split(batch_size)):
            yield Batch(ids, masks[number] if masks is not None else None, source, self.begin_token)

    def split(self, held_out: int, end: int | None = None) -> tuple[Calibration, Calibration]:
        """Part the last `held_out` sequences from the others.

        Args:
            held_out: how many.
            end: they are the last ones of the first so many sequences; None = of all.

        Returns:
            The others, and the held-out ones.

        Raises:
            OptionError: one of the two would be empty.
        """
        if not 0 < held_out < len(self):
            raise OptionError(
                f"`held_out` is {held_out}, of {len(self)} calibration sequences: both parts need at least one"
            )
        end = len(self) if end is None else min(end, len(self))
        apart = torch.zeros(len(self), dtype=torch.bool)
        apart[end - held_out : end] = True
        part = "" if self.provenance.part == "all" else f"{self.provenance.part}/"
        return self._part(~apart, f"{part}fitted"), self._part(apart, f"{part}held_out")

    def first(self, number: int) -> Calibration:
        """The first `number` sequences, at least one; itself where it has no more."""
        return self if number >= len(self) else self.split(len(self) - number)[0]

    def cycled(self, number: int) -> Calibration:
        """So many sequences, from the first: where it has no more, from the first again."""
        if number == len(self):
            return self
        return self._part(torch.arange(number) % len(self), self.provenance.part)

    def without(self, others: Tensor) -> Calibration:
        """The sequences that have no run of `SHARED` tokens in common with any of some others.

        A run that more than `COMMON` sequences have is what many texts hold, a system prompt or a licence: it tells
        nothing, nor does one that reaches into it.

        Args:
            others: int64, (samples, seq_len), both of them any; of shorter sequences, runs are as long as these.
        """
        length = min(SHARED, self.input_ids.shape[1], others.shape[1])
        runs = _runs(self.input_ids, length)
        shared = torch.isin(runs, _runs(others, length))
        rows, places = shared.nonzero(as_tuple=True)
        once_each = torch.stack([rows, runs[rows, places]], dim=1).unique(dim=0)
        values, sequences = once_each[:, 1].unique(return_counts=True)
        common = torch.isin(runs, values[sequences > COMMON]).float()
        near = functional.max_pool1d(common, 2 * length - 1, stride=1, padding=length - 1).bool()
        return self._part(~(shared & ~near).any(dim=1), self.provenance.part)

    def _part(self, which: slice | Tensor, name: str) -> Calibration:
        ids = self.input_ids[which]
        mask = self.attention_mask[which] if self.attention_mask is not None else None
        provenance = self.provenance.of_part(ids, mask, name)
        if self.sources is None:
            return replace(self, input_ids=ids, provenance=provenance, attention_mask=mask)
        sources = self.sources[which]
        rows = [sources == number for number in range(len(provenance.sources))]
        each = [
            source.of_part(ids[row], None if mask is None else mask[row], name)
            for source, row in zip(provenance.sources, rows, strict=True)
        ]
        provenance = replace(provenance, sources=tuple(each))
        return replace(self, input_ids=ids, provenance=provenance, attention_mask=mask, sources=sources)


def _runs(ids: Tensor, length: int) -> Tensor:
    """A number for each run of `length` tokens, modulo 2^64: (samples, seq_len) → (samples, seq_len - length + 1)."""
    number = ids.shape[1] - length + 1
    runs = torch.zeros(len(ids), number, dtype=torch.int64)
    for place in range(length):
        runs = runs * _FACTOR + ids[:, place : place + number]
    return runs


def hash_tokens(input_ids: Tensor, attention_mask: Tensor | None = None) -> str:
    """SHA-256 of the shape and the ids as little-endian int64, and of the mask as bytes if there is one."""
    digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    digest.update(input_ids.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    if attention_mask is not None:
        digest.update(attention_mask.to("cpu", torch.uint8).contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_batches(batches: Iterable[Batch]) -> str:
    """SHA-256 over the shapes, token ids and masks of batches, in order."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for batch in batches:
            yield "ids", batch.input_ids
            if batch.attention_mask is not None:
                yield "mask", batch.attention_mask

    return digest_tensors(tensors())
