"""What a command works on: the model, the text to calibrate on, and the text to measure on."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prunus.calibration import Calibration, load_calibration
from prunus.checkpoint import (
    check_disk,
    check_folder,
    check_output,
    empty_model,
    load_model,
    locate,
    model_bytes,
    open_model,
    read_config,
    resolve_device,
    resolve_dtype,
)
from prunus.errors import CalibrationError, OptionError
from prunus.evaluation.perplexity import PerplexityResult, perplexity, perplexity_of_windows, read_text
from prunus.evaluation.zero_shot import Task, load_tasks, zero_shot
from prunus.machine.processes import is_first
from prunus.model.geometry import Geometry
from prunus.selection.select import check_reachable
from prunus.sweep import ENGINES, Engine, EngineChoice
from prunus.sweep.estimate import Workload, available_memory, choose_engine, estimate, parse_bytes, show_bytes

if TYPE_CHECKING:
    from prunus.pipeline.job import Job
    from prunus.pipeline.recipe import Recipe

__all__ = [
    "CalibrationOptions",
    "EvaluationOptions",
    "Inputs",
    "ModelOptions",
    "draw_calibration",
    "load_or_open",
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
        max_memory: memory that may be used, e.g. 8GB: RAM, or the GPU's if the device is one. Jobs estimated to exceed
            it are rejected, naming the smallest sufficient limit.
        engine: resident runs each sequence through the whole model; streamed runs all sequences through one layer at a
            time, which takes longer, reads weights from disk when they are needed and holds the gradients of one layer
            only; auto is resident if that fits into memory.
        batch_size: calibration sequences per pass. It changes time and memory, and results only by rounding.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_memory: str | None = None
    engine: EngineChoice = "auto"
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_bytes(self.max_memory)
        if self.engine not in ("auto", *ENGINES):
            raise OptionError(f"engine {self.engine!r} is unknown; choose one of auto, {', '.join(ENGINES)}")
        if self.batch_size < 1:
            raise OptionError(f"batch size is {self.batch_size}; it must be at least 1")


@dataclass(frozen=True)
class CalibrationOptions:
    """The text that importance is measured on.

    Attributes:
        source: a .txt, .jsonl or .parquet file; c4, wikitext2, ptb or another data set of the Hub; `default` for
            the text that ships with Python; `self` for text that the model writes.
        samples: number of sequences.
        seq_len: tokens per sequence.
        seed: decides which sequences are drawn.
        text_column: column that holds the text in .jsonl and .parquet files.
        begin_token: where the tokenizer puts a token before every text, as for Llama 3 and Gemma, begin each sequence
            with it.
    """

    source: str = "default"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    text_column: str = "text"
    begin_token: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError(f"samples is {self.samples}; calibration needs at least one sequence")
        if self.seq_len < 2:
            raise OptionError(f"seq_len is {self.seq_len}; a sequence needs at least two tokens")


@dataclass(frozen=True)
class EvaluationOptions:
    """How the models before and after are compared.

    Attributes:
        text: a text file to measure perplexity on, before and after; without it, calibration sequences that were
            held out.
        seq_len: tokens per window of the text.
        windows: only the first so many windows of the text.
        begin_token: where the tokenizer puts a token before every text, begin each window with it. GPTQ and the
            tools after it do not.
        held_out: number of held-out calibration sequences, where no text is given; 0 = measure nothing.
        tasks: files or folders of zero-shot tasks, measured by `prunus compare`.
        items: only the first so many items of each task.
    """

    text: str | None = None
    seq_len: int = 2048
    windows: int | None = None
    begin_token: bool = True
    held_out: int = 16
    tasks: tuple[str, ...] = ()
    items: int | None = None

    def __post_init__(self) -> None:
        if self.items is not None and self.items < 1:
            raise OptionError(f"items is {self.items}; it must be at least 1")
        if self.held_out < 0:
            raise OptionError(f"held_out is {self.held_out}; it must not be negative")

    def tokens(self, text: str | None, seq_len: int) -> int:
        """At most how many tokens perplexity is measured on: those of a text, else of held-out sequences."""
        if text is None:
            return self.held_out * seq_len
        return len(text) if self.windows is None else self.windows * self.seq_len


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
        options.source,
        tokenizer,
        seq_len=options.seq_len,
        seed=options.seed,
        text_column=options.text_column,
        begin_token=options.begin_token,
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
            options.source,
            held_out,
            samples,
        )
        return enough, None
    return drawn.split(held_out) if samples else (None, drawn)


def load_or_open(
    source: str,
    options: ModelOptions,
    workload: Workload | None = None,
    *,
    scratch: Path | None = None,
    progress: bool = True,
) -> tuple[Any, Any, Engine]:
    """Load a model, or open it so that its decoder layers stay on disk, whichever is asked for or fits.

    Args:
        source: a folder, a Hub id or `smollm2-135m`.
        options: device, dtype, memory and engine; engine auto is decided by an estimate, which is printed on stderr.
        workload: what will be done with the model; None for a forward pass at most.
        scratch: folder for changed layers of an opened model.
        progress: whether to print.

    Returns:
        The model, its tokenizer, and the engine it is held for.

    Raises:
        OptionError: the estimate is larger than `options.max_memory`.
    """
    limit = parse_bytes(options.max_memory) if options.max_memory else None
    engine: EngineChoice = options.engine
    if engine == "auto" or limit is not None:
        device, folder = resolve_device(options.device), locate(source)
        check_folder(folder)
        config = read_config(folder)
        dtype = resolve_dtype(options.dtype)
        held_in: torch.dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        needed = estimate(empty_model(config, held_in), held_in, workload or Workload(), device)
        free = available_memory(device)
        asked, engine = engine, choose_engine(needed, engine, limit, free)
        if asked == "auto" and progress and is_first():
            bound = f"limit {show_bytes(limit)}" if limit else f"free {show_bytes(free)}" if free else "no limit known"
            print(
                f"engine {engine}: about {show_bytes(needed.of(engine))} of memory (resident "
                f"{show_bytes(needed.resident)}, streamed {show_bytes(needed.streamed)}, {bound})",
                file=sys.stderr,
            )
    if engine == "streamed":
        return *open_model(source, dtype=options.dtype, device=options.device, scratch=scratch), engine
    return *load_model(source, dtype=options.dtype, device=options.device), "resident"


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
        text: the text to measure perplexity on, if one was given.
        text_name: what perplexity is measured on, for a reader.
        evaluation: how perplexity is measured.
        tasks: zero-shot tasks.
    """

    source: str
    model: Any
    tokenizer: Any
    engine: Engine
    geometry: Geometry
    calibration: Calibration | None
    held_out: Calibration | None
    text: str | None
    text_name: str
    evaluation: EvaluationOptions
    tasks: Sequence[Task] = ()

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
                seq_len=self.evaluation.seq_len,
                max_windows=self.evaluation.windows,
                begin_token=self.evaluation.begin_token,
                progress=progress,
            )
        if self.held_out is not None:
            return perplexity_of_windows(
                model, self.held_out.input_ids, self.held_out.attention_mask, progress=progress
            )
        return None

    def accuracies(self, model: Any) -> dict[str, float]:
        """Zero-shot accuracy of a model on each task, normalised by length where the task's rules say so."""
        return {
            task.name: zero_shot(model, self.tokenizer, task, limit=self.evaluation.items).accuracy_norm
            for task in self.tasks
        }

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
    check_output(out, overwrite, job.model)
    text = read_text(evaluation.text) if evaluation.text else None
    tasks = load_tasks(evaluation.tasks) if evaluation.tasks else ()
    workload = Workload(
        frozenset[str]().union(*(recipe.scoring.needs for recipe in recipes)),
        sequences=calibration.samples if calibrate else 0,
        seq_len=calibration.seq_len,
        batch_size=job.run.batch_size,
        repairs=any(recipe.repair is not None for recipe in recipes),
        writes_text=any(recipe.writes_text for recipe in recipes),
        evaluation_tokens=evaluation.tokens(text, calibration.seq_len),
        inputs_on_disk=work is not None,
    )
    dense, tokenizer, engine = load_or_open(job.model, job.run, workload, scratch=work, progress=progress)
    geometry = Geometry.of(dense)
    for recipe, ratio in product(recipes, ratios):
        check_reachable(geometry, ratio, recipe.selection, recipe.target.costs(geometry))
    if save_model:
        # How many parameters another target leaves is not known before groups are ranked.
        in_parameters = all(recipe.target.name == "params" for recipe in recipes)
        check_disk(out, int(model_bytes(dense) * (1 - min(ratios) if in_parameters else 1)))
    sequences, held_out = draw_calibration(
        dense,
        tokenizer,
        calibration,
        held_out=0 if text else evaluation.held_out,
        needed=calibrate,
        progress=progress,
    )
    name = f"held-out calibration sequences ({Path(calibration.source).name})"
    if evaluation.text:
        name = Path(evaluation.text).name
    return Inputs(job.model, dense, tokenizer, engine, geometry, sequences, held_out, text, name, evaluation, tasks)


def model_name(model: str) -> str:
    """What a result calls its base model: a Hub id as it is, of a folder its own name."""
    folder = Path(model).expanduser()
    # "." and ".." have no name of their own; links keep theirs.
    return Path(os.path.abspath(folder)).name if folder.is_dir() else model
