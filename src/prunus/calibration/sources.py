"""Calibration text of several kinds: sources with shares of the sequences.

    c4.jsonl:2   self   notes.txt        half of the sequences of the first, a quarter of each of the others
    mixture                              several kinds of text from the Hub, see `MIXTURES`

Sequences of all sources are mixed evenly, so that any first or last part has about the shares of the whole. Each keeps
its source: importances and repair are made so that no source decides by the size of its gradients or activations (see
`prunus.scoring.mixing` and `prunus.repair.least_squares`), but by its share alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from prunus.calibration.batches import Calibration, Provenance, hash_tokens
from prunus.errors import OptionError
from prunus.option_values import check_utf8
from prunus.settings import Form
from prunus.settings.key import shown

__all__ = ["MIXTURES", "SOURCES", "Source", "mixed", "read_sources", "sequences_of"]

#: names that stand for several sources, with their shares
MIXTURES = {"mixture": {"c4": 2.0, "wikipedia": 1.0, "code": 1.0, "dialogue": 1.0}}
_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?)")
#: a larger weight is rather the configuration of a data set on the Hub
LARGEST_WEIGHT = 1000


@dataclass(frozen=True)
class Source:
    """A text and its share.

    Attributes:
        name: as `prunus.load_calibration` takes it.
        weight: its share is this, divided by the sum of all weights.
    """

    name: str
    weight: float = 1.0


def read_sources(words: str | Sequence[str]) -> list[Source]:
    """What a user wrote for the sources of a calibration: names, each perhaps with `:WEIGHT` behind it.

    A mixture comes as its parts, which share its weight.

    Raises:
        OptionError: there is none, one has the weight 0, or one is there twice.
    """
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise OptionError("there is no calibration source; name at least one, or leave `calibration` out")
    sources = []
    for each in words:
        check_utf8("the calibration source", each)
        match = _WEIGHT.fullmatch(each)
        named = Source(match[1], float(match[2])) if match else Source(each)
        if not named.weight:
            raise OptionError(f"the calibration source {each!r} has the weight 0; leave it out")
        if named.weight > LARGEST_WEIGHT:
            raise OptionError(
                f"the calibration source {each!r} has the weight {named.weight:g}; the largest is {LARGEST_WEIGHT:,}. "
                f"A configuration of that name is written with a split, {each}:train"
            )
        parts = MIXTURES.get(named.name, {named.name: 1.0})
        sources += [Source(name, named.weight * part / sum(parts.values())) for name, part in parts.items()]
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        within = [name for name, parts in MIXTURES.items() if twice[0] in parts and name in {*map(_name, words)}]
        again = f"as a part of {within[0]!r}; give one of them" if within else f"write {twice[0]}:2 for twice the share"
        raise OptionError(f"the calibration source {twice[0]!r} is there twice{',' if within else ';'} {again}")
    return sources


def _name(words: str) -> str:
    """A source without its weight."""
    match = _WEIGHT.fullmatch(words)
    return match[1] if match else words


def sequences_of(sources: Sequence[Source], samples: int) -> list[int]:
    """How many of the sequences are of each source: by weight, rounded so that they add up.

    Raises:
        OptionError: there are fewer sequences than sources.
    """
    if samples < len(sources):
        raise OptionError(
            f"{samples} calibration sequences cannot be of {len(sources)} sources; ask for more `samples`"
        )
    # Each has one, and the rest goes where most is missing of its share.
    numbers, total = [1] * len(sources), sum(source.weight for source in sources)
    for _ in range(samples - len(sources)):
        missing = [samples * source.weight / total - number for source, number in zip(sources, numbers, strict=True)]
        numbers[missing.index(max(missing))] += 1
    return numbers


def mixed(parts: Sequence[Calibration]) -> Calibration:
    """One calibration from the sequences of several sources, mixed evenly; of one, itself.

    Args:
        parts: of one source each, with sequences of one length, none of them padded.
    """
    if len(parts) == 1:
        return parts[0]
    places = [(index + 0.5) / len(part) for part in parts for index in range(len(part))]
    sources = list(chain.from_iterable([number] * len(part) for number, part in enumerate(parts)))
    order = sorted(range(len(places)), key=lambda index: (places[index], sources[index]))
    ids = torch.cat([part.input_ids for part in parts])[order]
    each = [part.provenance for part in parts]
    documents = [provenance.documents for provenance in each]
    provenance = Provenance(
        source=" + ".join(provenance.source for provenance in each),
        kind="mixture",
        seed=each[0].seed,
        samples=len(ids),
        seq_len=ids.shape[1],
        tokens=ids.numel(),
        documents=None if None in documents else sum(number or 0 for number in documents),
        sha256=hash_tokens(ids),
        part=each[0].part,
        sources=tuple(each),
    )
    return replace(parts[0], input_ids=ids, provenance=provenance, sources=torch.tensor(sources)[order])


def _read_words(raw: Any, name: str) -> tuple[str, ...]:
    words = (raw,) if isinstance(raw, str) else raw
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise OptionError(f"{name} is {shown(raw)}; write a text, or a list of them: [FILE:2, self]")
    return tuple(words)


def _written_words(words: tuple[str, ...]) -> str | list[str]:
    return words[0] if len(words) == 1 else list(words)


#: sources as a file or a command line writes them
SOURCES = Form(_read_words, _written_words, "text, or a list, each text")
