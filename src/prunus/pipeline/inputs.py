"""What a command works on: the model, the text to calibrate on, and the text to measure on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration, load_calibration
from prunus.checkpoint import dtype_to_save, locate, model_bytes
from prunus.errors import TextTooShortError
from prunus.evaluation.perplexity import (
    FEW_TOKENS,
    TextWindows,
    cut_text,
    perplexity_of_text,
    read_text,
    warn_of_few_tokens,
    window_length,
)
from prunus.evaluation.zero_shot import EncodedTask, encode_task, load_tasks, zero_shot_of
from prunus.files.outputs import check_disk, check_output
from prunus.model.geometry import Geometry
from prunus.model.saved_dtype import save_in_
from prunus.model.tokens import check_tokens
from prunus.option_values import check_utf8
from prunus.pipeline.job import Job
from prunus.pipeline.options import DEFAULT_CALIBRATION_LEN, CalibrationOptions
from prunus.pipeline.recipe import Recipe
from prunus.results.lineage import lineage_of
from prunus.selection.select import check_reachable
from prunus.sweep import Engine
from prunus.sweep.engine import ModelOptions, config_of, load_or_open, settled
from prunus.sweep.estimate import Workload
from prunus.sweep.sequence_loss import PerplexityResult, perplexity_of_windows

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
    progress: bool = True,
) -> tuple[Calibration | None, Calibration | None]:
    """The sequences to calibrate on, and others of the same source that are held out for measuring.

    Raises:
        OptionError: the model cannot read them, see `prunus.model.tokens.check_tokens`.
        CalibrationError: the text is missing, unreadable or too short.
    """
    calibration, rest = _draw(model, tokenizer, options, held_out, needed, progress)
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
    model: Any, tokenizer: Any, options: CalibrationOptions, held_out: int, needed: bool, progress: bool
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
        text_column=options.text_column,
        chat_column=options.chat_column,
        begin_token=options.begin_token,
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
            options.source,
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
        run: where and how the model runs, with nothing left open.
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
    run: ModelOptions
    geometry: Geometry
    calibration: Calibration | None
    held_out: Calibration | None
    text: TextWindows | None
    text_name: str
    tasks: Sequence[EncodedTask] = ()

    @property
    def engine(self) -> Engine:
        """Which one the model is held for."""
        return "streamed" if self.run.engine == "streamed" else "resident"

    @property
    def measurable(self) -> bool:
        """Whether there is anything to measure perplexity on."""
        return self.text is not None or self.held_out is not None

    def measure(self, model: Any, *, progress: bool = True) -> PerplexityResult | None:
        """Perplexity of a model, dense or pruned, on the text, else on held-out sequences, else nothing."""
        if self.text is not None:
            return perplexity_of_text(model, self.text, progress=progress)
        if self.held_out is not None:
            return perplexity_of_windows(
                model, self.held_out.input_ids, self.held_out.attention_mask, progress=progress
            )
        return None

    def accuracies(self, model: Any) -> dict[str, float]:
        """Zero-shot accuracy of a model on each task, normalised by length where the task's rules say so."""
        results = (zero_shot_of(model, task) for task in self.tasks)
        return {result.task: result.accuracy_norm for result in results}

    def drawn_again(self, calibration: CalibrationOptions, *, progress: bool = True) -> Inputs:
        """The same model and evaluation text with other calibration sequences.

        Args:
            calibration: with another seed.
            progress: show progress bars on a terminal.
        """
        sequences, held_out = draw_calibration(
            self.model,
            self.tokenizer,
            calibration,
            held_out=0 if self.held_out is None else len(self.held_out),
            needed=self.calibration is not None,
            progress=progress,
        )
        return replace(self, calibration=sequences, held_out=held_out)


def open_inputs(
    job: Job,
    ratios: Sequence[float],
    recipes: Sequence[Recipe],
    out: str | Path,
    *,
    work: Path | None = None,
    save_model: bool,
    overwrite: bool,
    progress: bool = True,
) -> Inputs:
    """Check whatever can be checked, cheapest first, then load the model and its texts.

    Args:
        job: the model, its texts, and where it runs; its recipe and ratio are not read.
        ratios: shares of all parameters, or of what a recipe's target says, to remove.
        recipes: how.
        out: folder for the result.
        work: folder for changed layers of an opened model, and for what enters its layers; None = in memory.
        save_model: whether pruned models will be written to `out`.
        overwrite: replace an earlier result.
        progress: show progress bars on a terminal.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder.
    """
    calibration, evaluation = job.calibration, job.evaluation
    calibrate = any(recipe.needs_calibration for recipe in recipes)
    for recipe, ratio in product(recipes, ratios):
        recipe.check(ratio, sequences=calibration.samples if calibrate else None)
    check_utf8("model", str(job.model))
    check_output(out, overwrite, job.model, job.calibration.source, job.evaluation.text)
    if save_model:
        lineage_of(locate(job.model))  # damaged records are refused before the weights are read
    text = read_text(evaluation.text) if evaluation.text else None
    tasks = load_tasks(evaluation.tasks) if evaluation.tasks else ()
    config = config_of(job.model)
    seq_len = calibration.length(config)
    window = evaluation.window(text, seq_len, config)
    workload = Workload(
        frozenset[str]().union(*(recipe.scoring.needs for recipe in recipes)),
        sequences=calibration.samples if calibrate else 0,
        seq_len=seq_len,
        repairs=any(recipe.repair is not None for recipe in recipes),
        writes_text=any(recipe.writes_text for recipe in recipes),
        cuts=True,
        evaluation_tokens=evaluation.tokens(text, seq_len),
        evaluation_window=window,
        inputs_on_disk=work is not None,
    )
    run = settled(job.model, job.run, workload, progress=progress)
    dense, tokenizer, engine = load_or_open(job.model, run, workload, scratch=work, progress=progress)
    save_in_(dense, dtype_to_save(config, dense.dtype, job.output.save_dtype))
    run = replace(run, engine=engine)
    geometry = Geometry.of(dense)
    for recipe, ratio in product(recipes, ratios):
        check_reachable(geometry, ratio, recipe.selection, recipe.target.costs(geometry))
    if save_model:
        # How many parameters another target leaves is not known before groups are ranked.
        in_parameters = all(recipe.target.name == "params" for recipe in recipes)
        check_disk(out, int(model_bytes(dense) * (1 - min(ratios) if in_parameters else 1)))
    name, windows = f"held-out calibration sequences ({Path(calibration.source).name})", None
    if text is not None:
        name = Path(str(evaluation.text)).name
        windows = cut_text(
            tokenizer,
            text,
            seq_len=window_length(config, evaluation.seq_len),
            max_windows=evaluation.windows,
            begin_token=evaluation.begin_token,
        )
        check_tokens(config, windows.ids, "evaluation.seq_len")
        warn_of_few_tokens(name, windows.ids.numel() - len(windows.ids))
    encoded = [encode_task(config, tokenizer, task, limit=evaluation.items) for task in tasks]
    sequences, held_out = draw_calibration(
        dense,
        tokenizer,
        calibration,
        held_out=0 if text else evaluation.held_out,
        needed=calibrate,
        progress=progress,
    )
    return Inputs(job.model, dense, tokenizer, run, geometry, sequences, held_out, windows, name, encoded)
