"""The sequences that recovery trains on, and those that are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.calibration import Calibration, Reading, calibration_from_tokens, load_calibration
from prunus.errors import CalibrationError, OptionError
from prunus.recovery.options import TextOptions

__all__ = ["MOST_SAMPLES", "load_sequences", "unwritten_sequences", "wanted_sequences"]

#: sequences that are drawn where the user does not bound them: with 512 tokens each, eight million tokens
MOST_SAMPLES = 2**14


def wanted_sequences(options: TextOptions, needed: int | None) -> int:
    """How many sequences are asked for, those that are held out included.

    Args:
        options: which text.
        needed: sequences that all steps together go through; None where that is open.

    Raises:
        OptionError: text is to be written, and nothing says how much.
    """
    if options.written and options.samples is None and needed is None:
        raise OptionError(
            "the dense model would write text without an end: say how many sequences by `samples`, or how many steps "
            "by `max_steps`"
        )
    samples = options.samples if options.samples is not None else min(needed or MOST_SAMPLES, MOST_SAMPLES)
    return samples + options.held_out


def unwritten_sequences(options: TextOptions, needed: int | None) -> tuple[Calibration, Calibration]:
    """In the place of sequences that would have to be written first, as many that hold nothing, for a forecast."""
    ids = torch.zeros(wanted_sequences(options, needed), options.seq_len, dtype=torch.int64)
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
        What is trained on, and what is held out: of several sources, some of each.

    Raises:
        OptionError: conversations, and a tokenizer without a chat template; text is to be written, and nothing says how
            much.
        CalibrationError: the text is missing, unreadable or too short.
    """
    drawn = load_calibration(
        options.source,
        tokenizer,
        samples=wanted_sequences(options, needed),
        seq_len=options.seq_len,
        seed=options.seed,
        reading=Reading(options.text_column, options.chat_column, fewer=True, keep=keep),
        model=writer,
        progress=progress,
    )
    if apart is not None:
        drawn = drawn.without(apart)
    if len(drawn) < options.held_out + batch_size:
        beside = "" if apart is None else " beside those that are measured on"
        raise CalibrationError(
            f"the text {' + '.join(options.names)} holds {len(drawn)} sequences of {options.seq_len} tokens{beside}, "
            f"and {options.held_out} held out with one step of {batch_size} need {options.held_out + batch_size}. Give "
            "more text, or smaller `seq_len`, `held_out` or `batch_size`"
        )
    return drawn.split(options.held_out)
