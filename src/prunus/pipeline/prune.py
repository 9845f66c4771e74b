"""The main job, top to bottom: calibrate, score, select, cut, repair, measure, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from prunus.calibration import Calibration
from prunus.checkpoint import blocks_of
from prunus.errors import OptionError
from prunus.evaluation.samples import side_by_side
from prunus.files.outputs import claimed
from prunus.machine.stages import Stages
from prunus.model.geometry import Geometry
from prunus.model.live import live_model
from prunus.model.tokens import check_tokens
from prunus.pipeline.cutting import Passes, PruneResult, cut, first_scores
from prunus.pipeline.forecast import Forecast, begun, forecast
from prunus.pipeline.inputs import Inputs, open_inputs
from prunus.pipeline.job import Job
from prunus.pipeline.job_file import job_text
from prunus.pipeline.multimodal import recipe_inside, whole_metrics
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.progressive import TrainedRounds, check_training
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import check_request
from prunus.pipeline.stages import MEASURING, SAMPLES, SAVING, WRITING, stages_of
from prunus.pipeline.stored_blocks import check_recipe_for_blocks
from prunus.pipeline.work_folder import WorkFolder
from prunus.recovery.record import RECORD
from prunus.report import try_report
from prunus.results.result_folder import AGAIN, ResultRecords, read_metrics, save_result
from prunus.scoring.routing import active_parameters, routing_of
from prunus.selection.select import check_reachable
from prunus.sweep import EngineChoice
from prunus.sweep.engine import model_name
from prunus.version import __version__

__all__ = ["PruneResult", "forecast_prune", "prune", "prune_checkpoint", "prune_job"]


def prune(
    model: Any,
    ratio: float,
    calibration: Calibration | None = None,
    recipe: Recipe | None = None,
    *,
    batch_size: int = 1,
    engine: EngineChoice = "auto",
    work: Path | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune a live transformers model.

    Args:
        model: a causal language model; it is not changed.
        ratio: share of all its parameters (or of what the recipe's target says) to remove, in [0, 1).
        calibration: token sequences, from `prunus.load_calibration` or `prunus.calibration_from_texts`; None for a
            recipe that needs none. The seed they were drawn with is the seed of everything else.
        recipe: how; by default `Recipe()`, the default recipe of the command line as well.
        batch_size: sequences per pass; it changes time and memory, and results only by rounding.
        engine: how the passes run, see `prunus.score`.
        work: folder from which an interrupted run resumes with the same result.
        progress: show progress bars on a terminal.

    Raises:
        OptionError: the recipe cannot work; like the next two before any pass over the model.
        CalibrationError: the recipe needs calibration sequences.
        BudgetError: the ratio cannot be reached under the constraints.
        UnsupportedModelError: the model is of another kind, or not in memory, see `prunus.model.live`.
    """
    model = live_model(model)
    for value, kind, what in (
        (calibration, Calibration, "sequences, as `prunus.load_calibration` makes them"),
        (recipe, Recipe, "a `prunus.Recipe`, such as `prunus.Recipe.fast()`"),
    ):
        if value is not None and not isinstance(value, kind):
            raise OptionError(f"{kind.__name__.lower()} is of type {type(value).__name__}; give {what}")
    recipe, geometry = recipe_inside(recipe or Recipe(), model), Geometry.of(model)
    if recipe.recovery:
        raise OptionError("training needs folders and text: use `prune_checkpoint` or `prune_job` for a recipe with it")
    recipe.check(ratio, sequences=None if calibration is None else len(calibration))
    if (blocks := blocks_of(model)) is not None:
        check_recipe_for_blocks(blocks.title, geometry, recipe)
    check_reachable(geometry, ratio, recipe.selection, recipe.target.costs(geometry))
    if calibration is not None:
        check_tokens(model.config, calibration.input_ids)
    stages = Stages(stages_of(recipe, ratio), model.device, progress)
    passes = Passes(batch_size, engine, work, stages)
    scored = first_scores(model, calibration, ratio, recipe, passes)
    return cut(model, ratio, scored, recipe, passes, calibration)


def prune_checkpoint(
    model: str,
    out: str | Path,
    ratio: float,
    recipe: Recipe | None = None,
    *,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Prune a model folder or Hub model and save the result; `prune_job` takes device, memory and more.

    Args:
        model: a folder, a Hub id, or `smollm2-135m` for the packaged model.
        out: folder for the result; it appears when it is complete.
        ratio: share of all parameters (or of what the recipe's target says) to remove, in [0, 1).
        recipe: how; by default `Recipe()`.
        calibration: the text that importance is measured on.
        evaluation: how the models before and after are compared.
        overwrite: replace an earlier result.
        progress: show progress bars on a terminal.

    Returns:
        The metrics, as they are written to prunus/metrics.json.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder, as far as possible before any long work.
    """
    texts = calibration or CalibrationOptions(), evaluation or EvaluationOptions()
    return prune_job(Job(model, ratio, recipe or Recipe(), *texts), out, overwrite=overwrite, progress=progress)


def prune_job(
    job: Job, out: str | Path, *, overwrite: bool = False, command: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Do all that a job says, and save the result.

    Args:
        job: model, ratio, recipe, texts, and where it runs.
        out: folder for the result; it appears when it is complete.
        overwrite: replace an earlier result.
        command: what the user typed, for the model card.
        progress: show progress bars on a terminal.

    Returns:
        The metrics, as they are written to prunus/metrics.json.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder, as far as possible before any long work.
    """
    folder = WorkFolder(out, job.output.work)
    with claimed(out, folder.path, run=("prune", job, overwrite), command=command) as claim:
        earlier = read_metrics(claim.path) if claim.finished else None
        metrics = earlier or _made(job, out, folder, overwrite, command, progress)
        if job.output.report:
            try_report(out)
        folder.remove()
    return metrics


def forecast_prune(job: Job, out: str | Path, *, overwrite: bool = False) -> Forecast:
    """What `prune_job` would remove, and what it would take; nothing is written.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder, as far as weights need not be read.
    """
    folder = WorkFolder(out, job.output.work)
    request = check_request(job, out, work=folder.path, saves=True, overwrite=overwrite)
    check_training(request)
    return forecast(request)


def _made(
    job: Job, out: str | Path, folder: WorkFolder, overwrite: bool, command: str | None, progress: bool
) -> dict[str, Any]:
    """Check, load, prune, measure and save; the metrics."""
    request = check_request(job, out, work=folder.path, saves=True, overwrite=overwrite)
    check_training(request)
    asked, job = job, replace(request.job, recipe=request.recipes[0])
    pruning = [*([WRITING] if request.workload.writes_text else []), *stages_of(job.recipe, job.ratio)]
    stages = begun(request, progress)
    inputs = open_inputs(request, stages)
    trained = None
    work = folder.used_by(inputs.engine)
    if job.recipe.recovery:
        work = folder.path
        texts = inputs.tokenizer, work, inputs.held_out
        trained = TrainedRounds(request, job.recipe, *texts, overwrite=overwrite, progress=progress)
    passes = Passes(job.run.sequences_per_pass, inputs.engine, work, stages, job.calibration.seed)
    scored = first_scores(inputs.model, inputs.calibration, job.ratio, job.recipe, passes)
    result = cut(inputs.model, job.ratio, scored, job.recipe, passes, inputs.calibration, trained)
    with stages.enter(MEASURING):
        measured = _measured(inputs, result, progress)
    samples: list[dict[str, str]] = []
    if SAMPLES in stages:
        with stages.enter(SAMPLES):
            samples = side_by_side(inputs.model, result.model, inputs.tokenizer, progress=progress)
    metrics = {
        "prunus": __version__,
        "base_model": model_name(job.model),
        "command": command or AGAIN,
        "ratio": job.ratio,
        "achieved_ratio": result.achieved_ratio,
        **({"fit": asdict(asked.fit)} if asked.fit else {}),
        **measured,
        "saved_dtype": job.output.save_dtype,
        "plan": result.plan.fingerprint,
        "repair": asdict(job.recipe.repair) if job.recipe.repair else None,
        **_costs(stages, pruning),
        **{key: value for key, value in result.score.about.items() if key not in ("seconds", "peak_bytes")},
        # Text that only the repair used was used, too.
        "calibration": inputs.calibration.provenance.to_dict() if inputs.calibration is not None else None,
        **routing_of(result.score.about.get("routing"), result.plan, _tokens_after(result)),
    }
    with stages.enter(SAVING):
        run = replace(job.run, engine=inputs.engine)
        recipe = job_text(replace(asked, run=run, output=job.output), _made_by(result, inputs.calibration))
        records = ResultRecords(result.plan, metrics, result.score, samples, recipe)
        if trained is not None:
            records = replace(records, more={RECORD: trained.record}, sections=[trained.section])
        return save_result(result.model, inputs.tokenizer, records, out, source=inputs.source, overwrite=overwrite)


def _tokens_after(result: PruneResult) -> dict[int, Sequence[int]]:
    """How many tokens of the repair's text each expert that stays got, by the layer of the dense model."""
    return {repair.layer_idx: repair.tokens for repair in result.repairs if repair.tokens}


def _measured(inputs: Inputs, result: PruneResult, progress: bool) -> dict[str, Any]:
    """Parameters and perplexity before and after."""
    before, each_before = inputs.measure(inputs.model, progress=progress)
    after, each_after = inputs.measure(result.model, progress=progress)
    return {
        "parameters_before": inputs.geometry.total_parameters,
        "parameters_after": result.model.num_parameters(),
        **whole_metrics(inputs.model, result.model),
        **active_parameters(inputs.geometry, result.plan),
        "perplexity_before": before.perplexity if before else None,
        "perplexity_after": after.perplexity if after else None,
        "perplexity_by_source": [
            {"source": source, "before": dense, "after": pruned}
            for source, dense, pruned in zip(inputs.measured_sources, each_before, each_after, strict=False)
        ],
        "perplexity_text": inputs.text_name if after else None,
        "perplexity_protocol": after.protocol if after else None,
    }


def _costs(stages: Stages, pruning: Sequence[str]) -> dict[str, Any]:
    """What each stage took, and those that prune together."""
    peaks = [peak for name in pruning if (peak := stages.costs[name].peak_bytes) is not None]
    return {
        "seconds_to_prune": round(sum(stages.costs[name].seconds for name in pruning), 1),
        "peak_bytes": max(peaks, default=None),
        "stages": [
            {"stage": name, "seconds": round(cost.seconds, 2), "peak_bytes": cost.peak_bytes}
            for name, cost in stages.costs.items()
        ],
    }


def _made_by(result: PruneResult, calibration: Calibration | None) -> dict[str, str]:
    """Versions and digests that tell whether a job that is done again can give the same bytes."""
    facts = {"prunus": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
    if calibration is not None:
        facts["calibration_sha256"] = calibration.provenance.sha256
    return {**facts, "plan": result.plan.fingerprint}
