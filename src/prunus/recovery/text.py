"""The sequences that recovery trains on, and those that are held out.

Of a file, the last sequences of all (of the first `MOST_SAMPLES`, if there are more) are held out, so that runs of any
length hold out the same ones: their losses compare, and a model that is trained again is not measured on what it was
trained on. Of what has no end (a data set of the Hub, text that the model writes) they are those behind the ones that
are trained on, so that a shorter run holds out what a longer one was trained on. Nothing that shares text with a
held-out sequence of any source is trained on. Sources keep their shares: one that is too short for its share is gone
through again.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import Calibration, Reading, calibration_from_tokens, load_calibration
from prunus.calibration.loading import chat_column_of, check_sources, kind_of
from prunus.calibration.sources import Source, mixed, sequences_of
from prunus.errors import CalibrationError, OptionError
from prunus.recovery.options import TextOptions

__all__ = ["ENDLESS", "MOST_SAMPLES", "load_sequences", "unwritten_sequences", "wanted_sequences"]

logger = logging.getLogger(__name__)

#: sequences that are drawn where the user does not bound them: with 512 tokens each, eight million tokens
MOST_SAMPLES = 2**14
#: kinds of sources of which no more is drawn than is trained on and held out
ENDLESS = ("hub", "model")


def wanted_sequences(options: TextOptions, needed: int | None) -> int:
    """How many sequences to train on are asked for.

    Args:
        options: which text.
        needed: sequences that all steps together go through; None where that is open.

    Raises:
        OptionError: text is to be written, and nothing says how much; fewer are held out than there are sources.
    """
    if options.written and options.samples is None and needed is None:
        raise OptionError(
            "the dense model would write text without an end: say how many sequences by `samples`, or how many steps "
            "by `max_steps`"
        )
    if options.held_out < len(options.sources):
        raise OptionError(f"`held_out` is {options.held_out}; of {len(options.sources)} sources, hold out one each")
    return options.samples if options.samples is not None else min(needed or MOST_SAMPLES, MOST_SAMPLES)


def unwritten_sequences(options: TextOptions, needed: int | None) -> tuple[Calibration, Calibration]:
    """In the place of sequences that would have to be written first, as many that hold nothing, for a forecast."""
    ids = torch.zeros(wanted_sequences(options, needed) + options.held_out, options.seq_len, dtype=torch.int64)
    return calibration_from_tokens(ids).split(options.held_out)


def load_sequences(
    options: TextOptions,
    tokenizer: Any,
    needed: int | None,
    batch_size: int,
    *,
    writer: Any = None,
    keep: Path | None = None,
    apart: torch.Tensor | None = None,
    progress: bool = True,
) -> tuple[Calibration, Calibration]:
    """Draw sequences and part off the held-out ones.

    Args:
        options: which text.
        tokenizer: of the model that is trained.
        needed: sequences that all steps together go through; None where that is open.
        batch_size: sequences per step: fewer are too few.
        writer: the model that writes the text of the source `self`.
        keep: folder in which that text is kept, and found again.
        apart: sequences that the result will be measured on: what has text in common with them is left out.
        progress: show a bar on a terminal while it is written.

    Returns:
        What is trained on, and what is held out: of several sources, by their shares.

    Raises:
        OptionError: conversations, and a tokenizer without a chat template; text is to be written, and nothing says how
            much; fewer are held out than there are sources.
        CalibrationError: the text is missing, unreadable or too short.
    """
    wanted, sources = wanted_sequences(options, needed), options.sources
    check_sources(sources, options.chat_column)
    held = sequences_of(sources, options.held_out)
    most = sequences_of(sources, max(wanted, len(sources)))
    how: dict[str, Any] = {"seq_len": options.seq_len, "seed": options.seed, "model": writer, "progress": progress}
    reading = Reading(options.text_column, options.chat_column, fewer=True, keep=keep)
    parts = []
    for source, share, last in zip(sources, most, held, strict=True):
        bound = share if kind_of(source.name) in ENDLESS else max(share, MOST_SAMPLES)
        how["reading"] = replace(reading, chat_column=chat_column_of(source, options.chat_column))
        drawn = load_calibration(source.name, tokenizer, samples=bound + last, **how)
        whole = len(drawn) < bound + last
        if apart is not None:
            drawn = _left(drawn, apart, source, "that the result is measured on")
        least = last + (batch_size if len(sources) == 1 else 1)
        if len(drawn) < least:
            raise CalibrationError(_too_few(source.name, drawn, whole, apart, options, least))
        parts.append(drawn.split(last, None if kind_of(source.name) in ENDLESS else MOST_SAMPLES + last))
    measured = torch.cat([held_out.input_ids for _, held_out in parts])
    for number, (source, (fitted, held_out)) in enumerate(zip(sources, parts, strict=True)):
        if not len(left := _left(fitted, measured, source, "that are held out")):
            raise CalibrationError(
                f"every sequence of {source.name} shares text with those that are held out: it says the same again and "
                "again, and nothing would tell learning from learning by heart. Give other text"
            )
        parts[number] = left, held_out
    total = sum(source.weight for source in sources)
    # As many as make one pass over the source that lasts longest.
    longest = max(len(fitted) * total / source.weight for source, (fitted, _) in zip(sources, parts, strict=True))
    numbers = sequences_of(sources, max(len(sources), min(wanted, int(longest))))
    for source, number, (fitted, _) in zip(sources, numbers, parts, strict=True):
        if number > len(fitted):
            logger.warning(
                "%s has %d sequences to train on, and its share of the text is %d: it is gone through %.1f times",
                *(source.name, len(fitted), number, number / len(fitted)),
            )
    train_on = mixed([fitted.cycled(number) for number, (fitted, _) in zip(numbers, parts, strict=True)])
    if len(train_on) < batch_size:
        raise CalibrationError(f"{len(train_on)} sequences to train on are fewer than one step of {batch_size}")
    return train_on, mixed([held_out for _, held_out in parts])


def _left(part: Calibration, others: torch.Tensor, source: Source, why: str) -> Calibration:
    """What has no text in common with others; where that is much less, it is said."""
    left = part.without(others)
    if len(left) < 0.9 * len(part):
        logger.warning(
            "%s: %d of %d sequences left out, which share text with those %s",
            *(source.name, len(part) - len(left), len(part), why),
        )
    return left


def _too_few(
    name: str, drawn: Calibration, whole: bool, apart: torch.Tensor | None, options: TextOptions, least: int
) -> str:
    has = "holds" if whole else "was read for"
    beside = "" if apart is None else " beside those that the result is measured on"
    return (
        f"the text {name} {has} {len(drawn)} sequences of {options.seq_len} tokens{beside}, and {least} are needed, of "
        f"which {options.held_out} are held out. Give more text, or smaller `seq_len`, `held_out` or `batch_size`"
    )
