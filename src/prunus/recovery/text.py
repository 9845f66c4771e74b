"""The sequences that recovery trains on, and those that are held out."""

from __future__ import annotations

from typing import Any

from prunus.calibration import Calibration, Reading, load_calibration
from prunus.errors import CalibrationError
from prunus.recovery.options import TextOptions

__all__ = ["MOST_SAMPLES", "load_sequences"]

#: sequences that are drawn where the user does not bound them: with 512 tokens each, eight million tokens
MOST_SAMPLES = 2**14


def load_sequences(
    options: TextOptions, tokenizer: Any, needed: int | None, batch_size: int
) -> tuple[Calibration, Calibration]:
    """Draw sequences and part off the held-out ones.

    Args:
        options: which text.
        tokenizer: of the model that is trained.
        needed: sequences that all steps together go through; None where that is open.
        batch_size: sequences per step: fewer are too few.

    Returns:
        What is trained on, and what is held out.

    Raises:
        OptionError: conversations, and a tokenizer without a chat template.
        CalibrationError: the text is missing, unreadable or too short.
    """
    samples = options.samples if options.samples is not None else min(needed or MOST_SAMPLES, MOST_SAMPLES)
    samples += options.held_out
    drawn = load_calibration(
        options.source,
        tokenizer,
        samples=samples,
        seq_len=options.seq_len,
        seed=options.seed,
        reading=Reading(options.text_column, options.chat_column, fewer=True),
    )
    if len(drawn) < options.held_out + batch_size:
        raise CalibrationError(
            f"the text {options.source} holds {len(drawn)} sequences of {options.seq_len} tokens, and "
            f"{options.held_out} held out with one step of {batch_size} need {options.held_out + batch_size}. Give "
            "more text, or smaller `seq_len`, `held_out` or `batch_size`"
        )
    return drawn.split(options.held_out)
