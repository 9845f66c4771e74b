"""The main job, top to bottom: calibrate, score, select, cut, repair, measure, save."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from prunus.calibration import Calibration
from prunus.calibration.self_text import text_for_repair
from prunus.checkpoint import dtype_to_save, locate
from prunus.evaluation.samples import side_by_side
from prunus.files.outputs import check_output, claimed
from prunus.machine.metering import metered
from prunus.machine.placement import dtype_name, resolve_dtype
from prunus.model.geometry import Geometry
from prunus.model.live import live_model
from prunus.model.saved_dtype import save_in_, saved_dtype
from prunus.model.tokens import check_tokens
from prunus.pipeline.inputs import open_inputs
from prunus.pipeline.job import Job
from prunus.pipeline.job_file import job_text
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.rounds import carry_over
from prunus.pipeline.work_folder import SELF_TEXT, WorkFolder, of_round
from prunus.repair.block_repair import Repair, repair_
from prunus.report import try_report
from prunus.results.lineage import lineage_of
from prunus.results.result_folder import read_metrics, save_result
from prunus.scoring.score import Score, ScoringOptions, score, seed_of
from prunus.selection.plan import Plan
from prunus.selection.select import check_reachable, select
from prunus.selection.table import with_costs
from prunus.surgery import apply_plan
from prunus.sweep import EngineChoice
from prunus.sweep.engine import ModelOptions, config_of, load_or_open, model_name
from prunus.sweep.estimate import Workload
from prunus.version import __version__

__all__ = [
    "Passes",
    "Prepared",
    "PruneResult",
    "apply_checkpoint",
    "cut",
    "prune",
    "prune_checkpoint",
    "prune_job",
    "repair_seed",
    "repair_text",
]


@dataclass(frozen=True)
class PruneResult:
    """What pruning a live model gives.

    Attributes:
        model: the smaller model.
        plan: which groups were kept.
        score: the global table the plan was chosen from, and what it was made from. After several rounds the groups of
            earlier rounds stand in it as `prunus.pipeline.rounds.carry_over` says.
        repairs: what the repair did to each block in the last round; empty without one.
    """

    model: Any
    plan: Plan
    score: Score
    repairs: Sequence[Repair] = ()

    @property
    def achieved_ratio(self) -> float:
        """Share that was removed, of all parameters or of what the target said."""
        target = self.score.about["target"]
        return float(1 - target["after"] / target["before"]) if target["before"] else 0.0


@dataclass(frozen=True)
class Passes:
    """How sequences go through a model; results depend on it by rounding only.

    Attributes:
        batch_size: sequences per pass.
        engine: see `prunus.score`.
        progress: whether to show progress bars on a terminal.
    """

    batch_size: int = 1
    engine: EngineChoice = "auto"
    progress: bool = True

    def score(
        self,
        model: Any,
        calibration: Calibration | None,
        options: ScoringOptions,
        work: Path | None,
        again: bool = False,
    ) -> Score:
        """Score a model, see `prunus.score`."""
        return score(
            model,
            calibration,
            options,
            batch_size=self.batch_size,
            engine=self.engine,
            work=work,
            progress=self.progress,
            again=again,
        )


@dataclass(frozen=True)
class Prepared:
    """What several cuts of one model can share.

    Attributes:
        score: the scores of the dense model.
        repair_text: the sequences that repairs are made on; None without a repair.
    """

    score: Score
    repair_text: Calibration | None


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
    recipe, geometry = recipe or Recipe(), Geometry.of(model)
    recipe.check(ratio, sequences=None if calibration is None else len(calibration))
    check_reachable(geometry, ratio, recipe.selection, recipe.target.costs(geometry))
    if calibration is not None:
        check_tokens(model.config, calibration.input_ids)
    passes = Passes(batch_size, engine, progress)
    scored = passes.score(model, calibration, recipe.scoring, _part(work, of_round(1)))
    text = repair_text(model, calibration, recipe, work=_part(work, SELF_TEXT), progress=progress)
    return cut(model, ratio, Prepared(scored, text), recipe, passes, calibration, work=work)


def repair_text(
    model: Any, calibration: Calibration | None, recipe: Recipe, *, work: Path | None = None, progress: bool = True
) -> Calibration | None:
    """The sequences that the repairs of a recipe are made on, see `prunus.text_for_repair`; None without a repair."""
    if recipe.repair is None or calibration is None:
        return None
    seed = repair_seed(calibration, recipe)
    return text_for_repair(model, calibration, recipe.repair.self_text, seed=seed, work=work, progress=progress)


def repair_seed(calibration: Calibration | None, recipe: Recipe) -> int:
    """The seed of all that a repair draws: that of the recipe, or the one that the sequences were drawn with."""
    seed = recipe.scoring.random_seed
    return seed_of(calibration) if seed is None else seed


def cut(
    model: Any,
    ratio: float,
    prepared: Prepared,
    recipe: Recipe,
    passes: Passes,
    calibration: Calibration | None,
    *,
    work: Path | None = None,
) -> PruneResult:
    """Select, cut and repair, as often as the recipe says, from scores that are there.

    Args:
        model: the dense model.
        ratio: share to remove in the end.
        prepared: the dense model's scores, and the text of the repairs.
        recipe: how.
        passes: how passes run.
        calibration: what later rounds are scored on.
        work: folder from which an interrupted run resumes.
    """
    geometry, scored, text = Geometry.of(model), prepared.score, prepared.repair_text
    costs = recipe.target.costs(geometry)
    pruned, plan_so_far, table = model, Plan.keep_all(geometry), with_costs(scored.table, costs)
    repairs: Sequence[Repair] = ()
    steps, seed = recipe.steps(ratio), repair_seed(calibration, recipe)
    for step in steps:
        folder = _part(work, of_round(step.number))
        if step.number > 1:
            part = _first(calibration, step.scored_on)
            rescored = passes.score(pruned, part, recipe.scoring, folder, again=True)
            later = with_costs(rescored.table, costs.of_layers(plan_so_far.surviving_layers))
            table = carry_over(table, plan_so_far, later)
        plan = select(table, geometry, step.share, recipe.selection, costs, last=step.last)
        pruned = apply_plan(pruned, plan.after(plan_so_far, Geometry.of(pruned)))
        sequences = _first(text, step.repaired_on)
        if recipe.repair is not None and sequences is not None:
            batches = list(sequences.batches(passes.batch_size))
            resumed = _part(folder, "repair")
            repairs = repair_(
                pruned, model, plan, batches, recipe.repair, seed=seed, work=resumed, progress=passes.progress
            )
        plan_so_far = plan
    findings: dict[str, Any] = {"rounds": len(steps)}
    if text is not None:
        findings["repair_text"] = text.provenance.to_dict()
    scored = replace(scored, table=table, about={**scored.about, **findings})
    return PruneResult(pruned, plan_so_far, scored.with_target(recipe.target, plan_so_far), repairs)


def _part(work: Path | None, name: str) -> Path | None:
    """A part of a work folder, where there is one."""
    return None if work is None else work / name


def _first(calibration: Calibration | None, part: Callable[[int], int]) -> Calibration | None:
    """The first sequences, as many as `part` says of their number."""
    return None if calibration is None else calibration.first(part(len(calibration)))


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
        if claim.finished:
            metrics = read_metrics(claim.path)
        else:
            inputs = open_inputs(
                job,
                [job.ratio],
                [job.recipe],
                out,
                work=folder.path,
                save_model=True,
                overwrite=overwrite,
                progress=progress,
            )
            with metered(inputs.model.device) as cost:
                result = prune(
                    inputs.model,
                    job.ratio,
                    inputs.calibration,
                    job.recipe,
                    batch_size=inputs.run.sequences_per_pass,
                    engine=inputs.engine,
                    work=folder.used_by(inputs.engine),
                    progress=progress,
                )
            before = inputs.measure(inputs.model, progress=progress)
            after = inputs.measure(result.model, progress=progress)
            metrics = {
                "prunus": __version__,
                "base_model": model_name(job.model),
                "command": command or _command(job, out),
                "ratio": job.ratio,
                "achieved_ratio": result.achieved_ratio,
                "parameters_before": inputs.geometry.total_parameters,
                "parameters_after": result.model.num_parameters(),
                "perplexity_before": before.perplexity if before else None,
                "perplexity_after": after.perplexity if after else None,
                "perplexity_text": inputs.text_name if after else None,
                "perplexity_protocol": after.protocol if after else None,
                "saved_dtype": dtype_name(saved_dtype(result.model)),
                "plan": result.plan.fingerprint,
                "repair": asdict(job.recipe.repair) if job.recipe.repair else None,
                "seconds_to_prune": round(cost.seconds, 1),
                "peak_bytes": cost.peak_bytes,
                **{key: value for key, value in result.score.about.items() if key not in ("seconds", "peak_bytes")},
            }
            # A streamed model would be read from the disk once for every token.
            shown = job.output.report and inputs.engine == "resident"
            samples = side_by_side(inputs.model, result.model, inputs.tokenizer, progress=progress) if shown else []
            metrics = save_result(
                result.model,
                inputs.tokenizer,
                out,
                result.plan,
                result.score,
                metrics,
                samples,
                inputs.source,
                overwrite,
                recipe=job_text(
                    replace(job, run=inputs.run, output=replace(job.output, save_dtype=metrics["saved_dtype"])),
                    _made_by(result, inputs.calibration),
                ),
            )
        if job.output.report:
            try_report(out)
        folder.remove()
    return metrics


def _made_by(result: PruneResult, calibration: Calibration | None) -> dict[str, str]:
    """Versions and digests that tell whether a job that is done again can give the same bytes."""
    facts = {"prunus": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
    if calibration is not None:
        facts["calibration_sha256"] = calibration.provenance.sha256
    return {**facts, "plan": result.plan.fingerprint}


def apply_checkpoint(
    model: str,
    plan: Plan,
    out: str | Path,
    *,
    model_options: ModelOptions | None = None,
    save_dtype: str = "auto",
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Cut a model folder or Hub model by a plan and save the result; nothing is measured.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        plan: which groups stay.
        out: folder for the result.
        model_options: device and dtype; nothing is computed, so that auto is the checkpoint's own dtype.
        save_dtype: see `OutputOptions`.
        overwrite: replace an earlier result.
        command: what the user typed, for the model card.

    Returns:
        The metrics, as they are written to prunus/metrics.json.
    """
    model_options = model_options or ModelOptions()
    resolve_dtype(save_dtype, "save_dtype")
    model = model_options.named(model)
    asked = "apply", model, plan.fingerprint, model_options, save_dtype, overwrite
    with claimed(out, run=asked, command=command) as claim:
        if claim.finished:
            metrics = read_metrics(claim.path)
        else:
            check_output(out, overwrite, model)
            lineage_of(locate(model))  # damaged records are refused before the weights are read
            config = config_of(model)
            if model_options.dtype == "auto":
                model_options = replace(model_options, dtype=dtype_name(config.dtype))
            dense, tokenizer, _ = load_or_open(model, model_options, workload=Workload(cuts=True))
            save_in_(dense, dtype_to_save(config, dense.dtype, save_dtype))
            geometry = Geometry.of(dense)
            plan.check_fits(geometry)
            smaller = apply_plan(dense, plan)
            del dense
            metrics = {
                "prunus": __version__,
                "base_model": model_name(model),
                "command": command or f"prunus apply {shlex.quote(model)} plan.json --out {shlex.quote(str(out))}",
                "ratio": 1 - smaller.num_parameters() / geometry.total_parameters,
                "parameters_before": geometry.total_parameters,
                "parameters_after": smaller.num_parameters(),
                "saved_dtype": dtype_name(saved_dtype(smaller)),
                "plan": plan.fingerprint,
            }
            metrics = save_result(
                smaller,
                tokenizer,
                out,
                plan,
                None,
                metrics,
                (),
                model,
                overwrite,
            )
    return metrics


def _command(job: Job, out: str | Path) -> str:
    """The command line that does a job of the Python interface, as far as a line can say it."""
    method = job.recipe.scoring.method
    return (
        f"prunus prune {shlex.quote(job.model)} --out {shlex.quote(str(out))} --ratio {job.ratio:g} --method {method}"
    )
