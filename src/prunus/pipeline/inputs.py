"""What a command works on: the model, the text to calibrate on, and the text to measure on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration, Reading, load_calibration
from prunus.errors import TextTooShortError
from prunus.evaluation.perplexity import (
    FEW_TOKENS,
    cut_text,
    perplexity_of_text,
    warn_of_few_tokens,
    window_length,
)
from prunus.evaluation.zero_shot import EncodedTask, encode_task, zero_shot_of
from prunus.machine.stages import Stages
from prunus.model.geometry import Geometry
from prunus.model.saved_dtype import save_in_, saved_dtype
from prunus.model.tokens import check_tokens
from prunus.model.whole import attach_whole_
from prunus.pipeline.options import DEFAULT_CALIBRATION_LEN, CalibrationOptions, EvaluationOptions
from prunus.pipeline.request import Request
from prunus.pipeline.stages import LOADING, WRITING
from prunus.sweep import Engine
from prunus.sweep.engine import load_or_open
from prunus.sweep.sequence_loss import PerplexityResult, Windows, perplexity_of_windows

__all__ = [
    "Inputs",
    "draw_calibration",
    "open_inputs",
]

logger = logging.getLogger(__name__)


def draw_calibration(
    model: Any,
    tokenizer: Any,
    options: CalibrationOptions,
    *,
    held_out: int,
    needed: bool,
    keep: Path | None = None,
    progress: bool = True,
) -> tuple[Calibration | None, Calibration | None]:
    """The sequences to calibrate on, and others of the same sources that are held out for measuring.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        options: the sources.
        held_out: number of held-out sequences.
        needed: whether there are sequences to calibrate on at all.
        keep: folder in which text that the model writes is kept, and found again.
        progress: show progress bars on a terminal.

    Raises:
        OptionError: the model cannot read them, see `prunus.model.tokens.check_tokens`.
        CalibrationError: the text is missing, unreadable or too short.
    """
    calibration, rest = _draw(model, tokenizer, options, held_out, needed, keep, progress)
    for part in (calibration, rest):
        if part is not None:
            check_tokens(model.config, part.input_ids)
    if calibration is not None and calibration.provenance.tokens < FEW_TOKENS:
        logger.warning(
            "importance is measured on %d tokens only: another text would rank the groups otherwise. Give more "
            "`samples` or a longer `seq_len`; the defaults take %s tokens",
            calibration.provenance.tokens,
            f"{CalibrationOptions.samples * DEFAULT_CALIBRATION_LEN:,}",
        )
    if rest is not None:
        warn_of_few_tokens("held-out sequences", rest.provenance.tokens - len(rest))
    return calibration, rest


def _draw(
    model: Any,
    tokenizer: Any,
    options: CalibrationOptions,
    held_out: int,
    needed: bool,
    keep: Path | None,
    progress: bool,
) -> tuple[Calibration | None, Calibration | None]:
    samples = options.samples if needed else 0
    if samples + held_out == 0:
        return None, None
    load = partial(
        load_calibration,
        options.source,
        tokenizer,
        seq_len=options.length(model.config),
        seed=options.seed,
        reading=Reading(options.text_column, options.chat_column, options.begin_token, keep=keep),
        model=model,
        progress=progress,
    )
    if not held_out:
        return load(samples=samples), None
    try:
        drawn = load(samples=samples + held_out)
    except TextTooShortError:
        # A text that is just long enough to calibrate on is used for that; one that is not fails here again.
        enough = load(samples=samples) if samples else None
        if enough is None:
            raise
        logger.warning(
            "%s has no %d sequences beyond the %d to calibrate on, so perplexity is not measured; give an evaluation "
            "text, or fewer held-out sequences",
            options.name,
            held_out,
            samples,
        )
        return enough, None
    return drawn.split(held_out) if samples else (None, drawn)


@dataclass(frozen=True)
class Inputs:
    """A model and its texts, checked and loaded.

    Attributes:
        source: what the model was loaded from: folder, Hub id or `smollm2-135m`.
        model: the dense model.
        tokenizer: its tokenizer.
        engine: which one the model is held for.
        geometry: its shape.
        calibration: sequences to calibrate on; None where nothing needs any.
        held_out: sequences to measure perplexity on; None where there is a text, or nothing is measured.
        text: the text to measure perplexity on, if one was given, cut into windows.
        text_name: what perplexity is measured on, for a reader.
        tasks: zero-shot tasks, as token ids.
    """

    source: str
    model: Any
    tokenizer: Any
    engine: Engine
    geometry: Geometry
    calibration: Calibration | None
    held_out: Calibration | None
    text: Windows | None
    text_name: str
    tasks: Sequence[EncodedTask] = ()

    @property
    def measurable(self) -> bool:
        """Whether there is anything to measure perplexity on."""
        return self.text is not None or self.held_out is not None

    def measure(self, model: Any, *, progress: bool = True) -> tuple[PerplexityResult | None, list[float]]:
        """Perplexity of a model, dense or pruned, on the text, else on held-out sequences, else nothing.

        Returns:
            That of all, and of held-out sequences the perplexity of each of their sources.
        """
        if self.text is not None:
            return perplexity_of_text(model, self.text, progress=progress), []
        if self.held_out is None:
            return None, []
        found = [
            perplexity_of_windows(model, source.input_ids, source.attention_mask, progress=progress)
            for source in self.held_out.each_source()
        ]
        return PerplexityResult.together(found), [result.perplexity for result in found]

    @property
    def measured_sources(self) -> list[str]:
        """Names of the sources whose perplexities `measure` gives; none where there is one, or a text."""
        sources = self.held_out.each_source() if self.held_out is not None and self.text is None else []
        return [source.provenance.source for source in sources] if len(sources) > 1 else []

    def accuracies(self, model: Any) -> dict[str, float]:
        """Zero-shot accuracy of a model on each task, normalised by length where the task's rules say so."""
        results = (zero_shot_of(model, task) for task in self.tasks)
        return {result.task: result.accuracy_norm for result in results}

    def with_texts(self, request: Request, calibration: CalibrationOptions, *, progress: bool = True) -> Inputs:
        """The same model and evaluation text with calibration sequences drawn.

        Args:
            request: what a command is asked to do.
            calibration: its own, or with another seed.
            progress: show progress bars on a terminal.
        """
        sequences, held_out = draw_calibration(
            self.model,
            self.tokenizer,
            calibration,
            held_out=request.held_out,
            needed=request.calibrates,
            keep=request.beside,
            progress=progress,
        )
        return replace(self, calibration=sequences, held_out=held_out)


def open_inputs(request: Request, stages: Stages) -> Inputs:
    """Load the model and the texts of a request that was checked.

    Args:
        request: what a command is asked to do.
        stages: told which stage begins.

    Raises:
        PrunusError: whatever is wrong with weights or texts.
    """
    calibration, writes = request.job.calibration, request.workload.writes_text
    with stages.enter(LOADING):
        inputs = _opened(request, stages.progress)
        if not writes:
            return inputs.with_texts(request, calibration, progress=stages.progress)
    with stages.enter(WRITING):
        return inputs.with_texts(request, calibration, progress=stages.progress)


def _opened(request: Request, progress: bool) -> Inputs:
    """The model, and the texts that it is measured on."""
    job = request.job
    run = replace(job.run, engine=request.engine, max_memory=None)
    dense, tokenizer, engine = load_or_open(job.model, run, scratch=request.work, progress=progress)
    save_in_(dense, saved_dtype(request.empty))
    if job.output.text_only:
        attach_whole_(dense, None)
    name, windows = f"held-out calibration sequences ({job.calibration.name})", None
    if request.text is not None:
        name = Path(str(job.evaluation.text)).name
        windows = _windows(dense.config, tokenizer, request.text, job.evaluation)
        warn_of_few_tokens(name, windows.ids.numel() - len(windows.ids))
    encoded = [encode_task(dense.config, tokenizer, task, limit=job.evaluation.items) for task in request.tasks]
    geometry = Geometry.of(dense)
    return Inputs(job.model, dense, tokenizer, engine, geometry, None, None, windows, name, encoded)


def _windows(config: Any, tokenizer: Any, text: str, options: EvaluationOptions) -> Windows:
    """The windows of a text that perplexity is measured on."""
    windows = cut_text(
        tokenizer,
        text,
        seq_len=window_length(config, options.seq_len),
        max_windows=options.windows,
        begin_token=options.begin_token,
    )
    check_tokens(config, windows.ids, "evaluation.seq_len")
    return windows
