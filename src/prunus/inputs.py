"""What a command works on: the model, the text to calibrate on, and the text to measure on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration, load_calibration
from prunus.errors import CalibrationError, OptionError
from prunus.evaluation.perplexity import PerplexityResult, perplexity, perplexity_of_windows

__all__ = [
    "CalibrationOptions",
    "EvaluationOptions",
    "ModelOptions",
    "draw_calibration",
    "measure",
    "text_name",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """Where and how the model is held.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps; auto is the first of cuda, mps, cpu that there is.
        dtype: auto keeps the checkpoint's own; else float32, bfloat16 or float16. The result is saved in it.
    """

    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class CalibrationOptions:
    """The text that importance is measured on.

    Attributes:
        calibration: a .txt, .jsonl or .parquet file; c4, wikitext2, ptb or another data set of the Hub; `default` for
            the text that ships with Python; `self` for text that the model writes.
        samples: number of sequences.
        seq_len: tokens per sequence.
        seed: decides which sequences are drawn.
        text_column: column that holds the text in .jsonl and .parquet files.
    """

    calibration: str = "default"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    text_column: str = "text"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError(f"samples is {self.samples}; calibration needs at least one sequence")
        if self.seq_len < 2:
            raise OptionError(f"seq_len is {self.seq_len}; a sequence needs at least two tokens")


@dataclass(frozen=True)
class EvaluationOptions:
    """How the models before and after are compared.

    Attributes:
        eval_text: a text file to measure perplexity on, before and after; without it, calibration sequences that were
            held out.
        eval_seq_len: tokens per window of the text.
        eval_windows: only the first so many windows of the text.
        held_out: number of held-out calibration sequences, where no text is given; 0 = measure nothing.
    """

    eval_text: str | None = None
    eval_seq_len: int = 2048
    eval_windows: int | None = None
    held_out: int = 16

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise OptionError(f"held_out is {self.held_out}; it must not be negative")


def draw_calibration(
    model: Any,
    tokenizer: Any,
    options: CalibrationOptions,
    *,
    held_out: int,
    needed: bool,
    progress: bool = True,
) -> tuple[Calibration | None, Calibration | None]:
    """The sequences to calibrate on, and others of the same source that are held out for measuring."""
    samples = options.samples if needed else 0
    if samples + held_out == 0:
        return None, None
    load = partial(
        load_calibration,
        options.calibration,
        tokenizer,
        seq_len=options.seq_len,
        seed=options.seed,
        text_column=options.text_column,
        model=model,
        progress=progress,
    )
    if not held_out:
        return load(samples=samples), None
    try:
        drawn = load(samples=samples + held_out)
    except CalibrationError:
        # A text that is just long enough to calibrate on is used for that; one that is not fails here again.
        enough = load(samples=samples) if samples else None
        if enough is None:
            raise
        logger.warning(
            "%s has no %d sequences beyond the %d to calibrate on, so perplexity is not measured; give an evaluation "
            "text, or fewer held-out sequences",
            options.calibration,
            held_out,
            samples,
        )
        return enough, None
    return drawn.split(held_out) if samples else (None, drawn)


def measure(
    model: Any,
    tokenizer: Any,
    text: str | None,
    held_out: Calibration | None,
    options: EvaluationOptions,
    *,
    progress: bool = True,
) -> PerplexityResult | None:
    """Perplexity on the evaluation text, else on held-out calibration sequences, else nothing."""
    if text is not None:
        return perplexity(
            model, tokenizer, text, seq_len=options.eval_seq_len, max_windows=options.eval_windows, progress=progress
        )
    if held_out is not None:
        return perplexity_of_windows(model, held_out.input_ids, progress=progress)
    return None


def text_name(evaluation: EvaluationOptions, calibration: CalibrationOptions) -> str:
    """What `measure` measures on, for a reader."""
    if evaluation.eval_text:
        return Path(evaluation.eval_text).name
    name = Path(calibration.calibration).name
    return f"held-out calibration sequences ({name})"
