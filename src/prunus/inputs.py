"""What a command works on: the model, the text to calibrate on, and the text to measure on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration, load_calibration
from prunus.checkpoint import check_disk, check_output, load_model, model_bytes
from prunus.errors import CalibrationError, OptionError
from prunus.evaluation.perplexity import PerplexityResult, perplexity, perplexity_of_windows, read_text
from prunus.groups import Geometry
from prunus.packaged_model import resolve_model
from prunus.selection import Constraints, check_ratio, check_reachable

__all__ = [
    "CalibrationOptions",
    "EvaluationOptions",
    "Inputs",
    "ModelOptions",
    "draw_calibration",
    "model_name",
    "open_inputs",
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


@dataclass(frozen=True)
class Inputs:
    """A model and its texts, checked and loaded.

    Attributes:
        source: folder or Hub id that the model was loaded from.
        model: the dense model.
        tokenizer: its tokenizer.
        geometry: its shape.
        calibration: sequences to calibrate on; None where nothing needs any.
        held_out: sequences to measure perplexity on; None where there is a text, or nothing is measured.
        text: the text to measure perplexity on, if one was given.
        text_name: what perplexity is measured on, for a reader.
        evaluation: how perplexity is measured.
    """

    source: str
    model: Any
    tokenizer: Any
    geometry: Geometry
    calibration: Calibration | None
    held_out: Calibration | None
    text: str | None
    text_name: str
    evaluation: EvaluationOptions

    @property
    def measurable(self) -> bool:
        """Whether there is anything to measure perplexity on."""
        return self.text is not None or self.held_out is not None

    def measure(self, model: Any, *, progress: bool = True) -> PerplexityResult | None:
        """Perplexity of a model, dense or pruned, on the text, else on held-out sequences, else nothing."""
        if self.text is not None:
            return perplexity(
                model,
                self.tokenizer,
                self.text,
                seq_len=self.evaluation.eval_seq_len,
                max_windows=self.evaluation.eval_windows,
                progress=progress,
            )
        if self.held_out is not None:
            return perplexity_of_windows(model, self.held_out.input_ids, progress=progress)
        return None


def open_inputs(
    model: str,
    out: str | Path,
    ratios: Sequence[float],
    constraints: Constraints | None,
    calibration: CalibrationOptions,
    evaluation: EvaluationOptions,
    model_options: ModelOptions,
    *,
    calibrate: bool,
    save_model: bool,
    overwrite: bool,
    progress: bool = True,
) -> Inputs:
    """Check whatever can be checked, cheapest first, then load the model and its texts.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        out: folder for the result.
        ratios: shares of all parameters to remove.
        constraints: what may be cut.
        calibration: the text to calibrate on.
        evaluation: what to measure on.
        model_options: device and dtype.
        calibrate: whether anything needs calibration sequences.
        save_model: whether pruned models will be written to `out`.
        overwrite: replace an earlier result.
        progress: show progress bars on a terminal.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder.
    """
    for ratio in ratios:
        check_ratio(ratio)
    check_output(out, overwrite)
    text = read_text(evaluation.eval_text) if evaluation.eval_text else None
    source = resolve_model(model)
    dense, tokenizer = load_model(source, dtype=model_options.dtype, device=model_options.device)
    geometry = Geometry.of(dense)
    for ratio in ratios:
        check_reachable(geometry, ratio, constraints)
    if save_model:
        check_disk(out, int(model_bytes(dense) * (1 - min(ratios))))
    sequences, held_out = draw_calibration(
        dense,
        tokenizer,
        calibration,
        held_out=0 if text else evaluation.held_out,
        needed=calibrate,
        progress=progress,
    )
    name = f"held-out calibration sequences ({Path(calibration.calibration).name})"
    if evaluation.eval_text:
        name = Path(evaluation.eval_text).name
    return Inputs(source, dense, tokenizer, geometry, sequences, held_out, text, name, evaluation)


def model_name(model: str) -> str:
    """What a result calls its base model: a Hub id as it is, of a folder its own name."""
    return Path(model).name if Path(model).is_dir() else model
