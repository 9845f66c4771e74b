"""What a command is asked to do, checked as far as that needs no weights: cheapest first, and before any long work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.loading import check_sources
from prunus.checkpoint import (
    attach_blocks_,
    blocks_in,
    check_whole,
    dtype_to_save,
    empty_model,
    held_dtype,
    locate,
    model_bytes,
    resolve_device,
    whole_around,
)
from prunus.errors import OptionError
from prunus.evaluation.perplexity import read_text
from prunus.evaluation.zero_shot import Task, load_tasks
from prunus.files.outputs import check_disk, check_output, place_of
from prunus.machine.placement import dtype_name
from prunus.model.geometry import Geometry
from prunus.model.saved_dtype import save_in_, saved_dtype
from prunus.model.whole import attach_whole_
from prunus.option_values import check_utf8
from prunus.pipeline.job import Job
from prunus.pipeline.multimodal import recipe_inside
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.stored_blocks import check_recipe_for_blocks
from prunus.results.lineage import lineage_of
from prunus.scoring.adaptive import check_enough
from prunus.selection.select import check_reachable
from prunus.sweep import Engine
from prunus.sweep.engine import Holding, config_of, holding_of, settled, streamed_if_in_blocks
from prunus.sweep.estimate import Workload, estimate

__all__ = ["Request", "check_request", "check_score_request"]


@dataclass(frozen=True, eq=False)
class Request:
    """A job on a model that is known by its shape.

    Attributes:
        job: model, texts, and where it runs; a size to fit has become a ratio of bytes, and dtypes and batch size are
            decided.
        recipes: how to prune; for scores alone, how to score.
        ratios: shares to remove by each recipe; none for scores alone.
        empty: the model without weights, in the dtype that it will be held in.
        geometry: its shape.
        seq_len: tokens of a calibration sequence.
        text: to measure perplexity on, if one was given.
        held_out: number of held-out sequences to measure on in its place.
        tasks: zero-shot tasks.
        workload: what will be done with the model.
        holding: engine and memory.
        work: folder for changed layers of an opened model, and for what enters its layers; None = in memory.
        saves: whether pruned models will be written.
        beside: folder that the output lies in, in which text that the model writes is kept.
        seeds: calibration sequences are drawn with each of these.
    """

    job: Job
    recipes: Sequence[Recipe]
    ratios: Sequence[float]
    empty: Any
    geometry: Geometry
    seq_len: int
    text: str | None
    held_out: int
    tasks: Sequence[Task]
    workload: Workload
    holding: Holding
    work: Path | None
    saves: bool
    beside: Path
    seeds: Sequence[int] = (0,)

    @property
    def engine(self) -> Engine:
        """Which engine the model will be held for."""
        return self.holding.engine

    @property
    def device(self) -> torch.device:
        """Where the model will run."""
        return resolve_device(self.job.run.device)

    @property
    def calibrates(self) -> bool:
        """Whether calibration sequences are needed."""
        return self.workload.sequences > 0


def check_request(
    job: Job,
    out: str | Path,
    *,
    ratios: Sequence[float] | None = None,
    recipes: Sequence[Recipe] | None = None,
    work: Path | None = None,
    saves: bool,
    overwrite: bool,
) -> Request:
    """Check a job that prunes.

    Args:
        job: the model, how it is pruned, its texts, and where it runs.
        out: folder for the result.
        ratios: shares of all parameters, or of what a recipe's target says, to remove, in place of the job's own.
        recipes: how, in place of the job's own.
        work: folder for changed layers of an opened model, and for what enters its layers; None = in memory.
        saves: whether pruned models will be written to `out`.
        overwrite: replace an earlier result.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder.
    """
    calibration, evaluation = job.calibration, job.evaluation
    job.fit.check_used()
    if job.fit and ratios is not None:
        raise OptionError("a comparison is made at ratios; leave `fit.size` and `fit.memory` out")
    if not saves and any(recipe.recovery for recipe in recipes or [job.recipe]):
        raise OptionError("a comparison is made without training; leave `recovery.minutes` and `recovery.tokens` out")
    asked = [job.ratio] if ratios is None else ratios
    recipes = [job.recipe] if recipes is None else recipes
    calibrate = any(recipe.needs_calibration for recipe in recipes)
    for recipe, ratio in product(recipes, asked):
        recipe.check(ratio, sequences=calibration.samples if calibrate else None)
    check_utf8("model", str(job.model))
    check_output(out, overwrite, *job.reads)
    if saves:
        lineage_of(locate(job.model))  # damaged records are refused before the weights are read
    text = read_text(evaluation.text) if evaluation.text else None
    tasks = load_tasks(evaluation.tasks) if evaluation.tasks else ()
    if calibrate or (evaluation.held_out and not text):
        check_sources(calibration.sources, calibration.chat_column)
    config = config_of(job.model)
    seq_len = calibration.length(config)
    workload = Workload(
        frozenset[str]().union(*(recipe.scoring.needs for recipe in recipes)),
        sequences=calibration.samples if calibrate else 0,
        seq_len=seq_len,
        repairs=any(recipe.repair is not None for recipe in recipes),
        writes_text=calibration.writes_text and (calibrate or bool(evaluation.held_out and not text)),
        cuts=True,
        evaluation_tokens=evaluation.tokens(text, seq_len),
        evaluation_window=evaluation.window(text, seq_len, config),
        inputs_on_disk=work is not None,
        sources=len(calibration.names),
    )
    save_dtype = job.output.save_dtype
    job, workload, empty, holding = _held(job, config, workload)
    geometry = Geometry.of(empty)
    if (blocks := blocks_in(locate(job.model), empty)) is not None:
        for recipe in recipes:
            check_recipe_for_blocks(blocks.title, geometry, recipe, fits=bool(job.fit))
        if save_dtype not in ("auto", dtype_name(config.dtype)):
            raise OptionError(
                f"`save_dtype` {save_dtype}: the model's weights are stored in {blocks.title} and are saved as they "
                "are; leave it out, or prune the bf16 checkpoint"
            )
        attach_blocks_(empty, blocks)
    if not job.output.text_only:
        attach_whole_(empty, whole_around(locate(job.model)))
    if job.fit:
        job = job.fitted(empty)
        asked, recipes = [job.ratio], [job.recipe]
    recipes = [recipe_inside(recipe, empty) for recipe in recipes]
    for recipe, ratio in product(recipes, asked):
        check_reachable(geometry, ratio, recipe.selection, recipe.target.costs(geometry))
    if saves:
        check_whole(empty)
        # How many parameters another target leaves is not known before groups are ranked.
        in_parameters = all(recipe.target.name == "params" for recipe in recipes)
        check_disk(out, int(model_bytes(empty) * (1 - min(asked) if in_parameters else 1)))
    texts = seq_len, text, 0 if text else evaluation.held_out, tasks
    return Request(job, recipes, asked, empty, geometry, *texts, workload, holding, work, saves, place_of(out).parent)


def check_score_request(job: Job, out: str | Path, *, work: Path | None, overwrite: bool) -> Request:
    """Check a job that scores; see `check_request`."""
    scoring = job.recipe.scoring
    check_output(out, overwrite, *job.reads)
    sequences = job.calibration.samples if scoring.needs_calibration else 0
    if scoring.method == "adaptive":
        check_enough(sequences)
    if sequences:
        check_sources(job.calibration.sources, job.calibration.chat_column)
    config = config_of(job.model)
    seq_len = job.calibration.length(config)
    writes_text = job.calibration.writes_text and sequences > 0
    workload = Workload(scoring.needs, sequences, seq_len, writes_text=writes_text)
    job, workload, empty, holding = _held(job, config, workload)
    geometry = Geometry.of(empty)
    beside = place_of(out).parent
    return Request(job, [job.recipe], [], empty, geometry, seq_len, None, 0, (), workload, holding, work, False, beside)


def _held(job: Job, config: Any, workload: Workload) -> tuple[Job, Workload, Any, Holding]:
    """The job and its workload with dtypes and batch size decided, the model without weights, and how it is held."""
    run = settled(config, streamed_if_in_blocks(job.model, job.run), workload)
    workload = replace(workload, batch_size=run.sequences_per_pass)
    empty = empty_model(config, held_dtype(config, run.dtype, run.device))
    save_in_(empty, dtype_to_save(config.dtype, empty.dtype, job.output.save_dtype))
    output = replace(job.output, save_dtype=dtype_name(saved_dtype(empty)))
    needed = estimate(empty, empty.dtype, workload, resolve_device(run.device), config.dtype)
    return replace(job, run=run, output=output), workload, empty, holding_of(needed, run)
