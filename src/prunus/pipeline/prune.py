"""The main job, top to bottom: calibrate, score, select, cut, repair, measure, save."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prunus.calibration import Batch, Calibration
from prunus.calibration.self_text import text_for_repair
from prunus.checkpoint import check_output
from prunus.evaluation.samples import side_by_side
from prunus.machine.metering import metered
from prunus.model.geometry import Geometry
from prunus.pipeline.budget_search import SearchOptions, search_budget
from prunus.pipeline.inputs import (
    CalibrationOptions,
    EvaluationOptions,
    ModelOptions,
    load_or_open,
    model_name,
    open_inputs,
)
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.rounds import carry_over, schedule
from prunus.pipeline.work_folder import SEARCH, SELF_TEXT, WorkFolder, of_round
from prunus.repair.compensation import CompensationOptions, Repair, compensate_
from prunus.repair.reselection import hand_out_scores, reselect
from prunus.report import write_report
from prunus.results.result_folder import save_result
from prunus.scoring.score import Score, ScoringOptions, score
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, check_reachable, select
from prunus.selection.table import price
from prunus.selection.targets import TargetOptions
from prunus.statistics import Statistics
from prunus.surgery import apply_plan
from prunus.version import __version__

__all__ = [
    "PruneResult",
    "apply_checkpoint",
    "prune",
    "prune_checkpoint",
]


@dataclass(frozen=True)
class PruneResult:
    """What pruning a live model gives.

    Attributes:
        model: the smaller model.
        plan: which groups stayed.
        score: the global table the plan was chosen from, and what it was made from. After several rounds the groups of
            earlier rounds stand in it as `prunus.pipeline.rounds.carry_over` says.
        repairs: what compensation did to each block in the last round; empty without compensation.
    """

    model: Any
    plan: Plan
    score: Score
    repairs: Sequence[Repair] = ()


def prune(
    model: Any,
    ratio: float,
    calibration: Calibration | None = None,
    *,
    scoring: ScoringOptions | None = None,
    constraints: Constraints | None = None,
    target: TargetOptions | None = None,
    compensation: CompensationOptions | None = None,
    rounds: int = 1,
    search: SearchOptions | None = None,
    scored: Score | None = None,
    repair_text: Calibration | None = None,
    work: Path | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune a live transformers model.

    Args:
        model: a causal language model; it stays as it is.
        ratio: share of all its parameters (or of what `target` says) to remove, in [0, 1).
        calibration: token sequences, from `prunus.load_calibration` or `prunus.calibration_from_texts`; None for a
            method that needs none.
        scoring: method and normalisation; default: first-order Taylor.
        constraints: what may be cut; default: everything.
        target: what the ratio is a share of; default: parameters.
        compensation: repair the remaining weights by least squares, see `prunus.repair.compensation`; None = plain slicing.
        rounds: cut in so many equal parts, scoring the model that is left (and repaired) before each next one. Later
            scores are taken on half of the sequences, and all repairs but the last are made on a quarter.
        search: how long factors on the scores of axes and depth bands are searched for; by default not at all.
        scored: the scores of `model` by `scoring`, if they are there already; they are taken otherwise.
        repair_text: what `text_for_repair` gave, if it is there already; it is made otherwise.
        work: folder from which a killed run goes on with the same result, see `prunus.sweep.sweep` and `compensate_`.
        progress: show progress bars on a terminal.

    Raises:
        OptionError: the recipe cannot work, see `prunus.pipeline.recipe`; like the next two before any pass over the model.
        CalibrationError: the recipe needs calibration sequences.
        StatisticsError: `scored` lacks what the repair chooses by.
        BudgetError: the ratio cannot be reached under the constraints.
        UnsupportedModelError: the model's family is not described.
    """
    recipe = Recipe.of(scoring, constraints, target, compensation, rounds, search)
    recipe.check(ratio, sequences=None if calibration is None else len(calibration), scored=scored)
    scoring, geometry = recipe.scoring, Geometry.of(model)
    costs = recipe.target.costs(geometry)
    check_reachable(geometry, ratio, constraints, costs)
    take = partial(score, options=scoring, curvature=recipe.reselects)
    steps = schedule(ratio, rounds)
    folders = [work / of_round(step.number) if work else None for step in steps]
    scored = scored or take(model, calibration, work=folders[0], progress=progress)
    smaller, done, statistics = model, Plan.keep_all(geometry), scored.statistics
    table, found = price(scored.table, costs), None
    if compensation is not None and calibration is not None and repair_text is None:
        repair_text = text_for_repair(
            model,
            calibration,
            compensation,
            seed=scoring.random_seed,
            work=work / SELF_TEXT if work else None,
            progress=progress,
        )
    if recipe.search.wanted:
        text = calibration if repair_text is None else repair_text
        assert text is not None  # or the recipe's check would have said so
        found = search_budget(
            model,
            table,
            ratio,
            text,
            recipe.search,
            constraints=constraints,
            costs=costs,
            compensation=compensation,
            batch_size=scoring.batch_size,
            work=work / SEARCH if work else None,
            progress=progress,
        )
        table = found.weigh(table)
    for step, folder in zip(steps, folders, strict=True):
        if step.number > 1:
            again = take(smaller, _first(calibration, step.scored_on), work=folder, progress=progress)
            later = price(again.table, costs.of_layers(done.surviving_layers))
            later = found.weigh(later, done.surviving_layers) if found else later
            table, statistics = carry_over(table, done, later), again.statistics
        plan = select(table, geometry, step.share, constraints, costs)
        fit = _first(repair_text, step.repaired_on)
        batches = list(fit.batches(scoring.batch_size)) if fit is not None else []
        smaller, kept, repairs = _cut(smaller, done, model, plan, statistics, batches, compensation, folder, progress)
        table, done = table if kept == plan else hand_out_scores(table, kept), kept
    findings = {"rounds": rounds, **({"budget_search": found.to_dict()} if found else {})}
    if repair_text is not None:
        findings["repair_text"] = repair_text.provenance.to_dict()
    scored = replace(scored, table=table, about={**scored.about, **findings})
    return PruneResult(smaller, done, scored.priced(recipe.target, done), repairs)


def _first(calibration: Calibration | None, part: Callable[[int], int]) -> Calibration | None:
    """The first sequences, as many as `part` says of their number."""
    return None if calibration is None else calibration.first(part(len(calibration)))


def _cut(
    model: Any,
    done: Plan,
    dense: Any,
    plan: Plan,
    statistics: Statistics | None,
    batches: Sequence[Batch],
    compensation: CompensationOptions | None,
    work: Path | None,
    progress: bool,
) -> tuple[Any, Plan, Sequence[Repair]]:
    """Cut what earlier rounds left (`done`), and repair it as asked: the result, what it keeps, the repairs."""
    work = work / "compensation" if work else None
    if compensation is not None and compensation.reselect:
        return reselect(model, done, dense, plan, statistics, batches, compensation, work=work, progress=progress)
    smaller, repairs = apply_plan(model, plan.after(done, Geometry.of(model))), []
    if compensation is not None:
        repairs = compensate_(smaller, dense, plan, batches, compensation, work=work, progress=progress)
    return smaller, plan, repairs


def prune_checkpoint(
    model: str,
    out: str | Path,
    ratio: float,
    *,
    calibration: CalibrationOptions | None = None,
    scoring: ScoringOptions | None = None,
    constraints: Constraints | None = None,
    target: TargetOptions | None = None,
    compensation: CompensationOptions | None = None,
    rounds: int = 1,
    search: SearchOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    model_options: ModelOptions | None = None,
    overwrite: bool = False,
    work: str | Path | None = None,
    command: str | None = None,
    report: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Prune a model folder or Hub model and save the result.

    Args:
        model: a folder, a Hub id, or `smollm2-135m` for the packaged model.
        out: folder for the result; complete or not there at all.
        ratio: share of all parameters (or of what `target` says) to remove, in [0, 1).
        calibration: the text that importance is measured on.
        scoring: method and normalisation.
        constraints: what may be cut.
        target: what the ratio is a share of; default: parameters.
        compensation: repair the remaining weights by least squares; None = plain slicing.
        rounds: cut in so many equal parts, see `prune`.
        search: for factors on the scores of axes and depth bands, see `prunus.pipeline.budget_search`.
        evaluation: how the models before and after are compared.
        model_options: device, dtype and memory.
        overwrite: replace an earlier result.
        work: folder from which a killed run goes on; None for `<out>.work` under the streamed engine, and no such
            folder under the resident one. Removed when the result is there.
        command: what the user typed, for the model card.
        report: also write report.html, with what both models make of a few prompts where both are in memory.
        progress: show progress bars on a terminal.

    Returns:
        The metrics, as they are written to prunus/metrics.json.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder, as far as possible before any long work.
    """
    recipe = Recipe.of(scoring, constraints, target, compensation, rounds, search)
    folder = WorkFolder(out, work)
    inputs = open_inputs(
        model,
        out,
        [ratio],
        [recipe],
        calibration or CalibrationOptions(),
        evaluation or EvaluationOptions(),
        model_options or ModelOptions(),
        work=folder.path,
        save_model=True,
        overwrite=overwrite,
        progress=progress,
    )
    with metered(inputs.model.device) as cost:
        result = prune(
            inputs.model,
            ratio,
            inputs.calibration,
            scoring=replace(recipe.scoring, engine=inputs.engine),
            constraints=constraints,
            target=target,
            compensation=compensation,
            rounds=rounds,
            search=search,
            work=folder.used_by(inputs.engine),
            progress=progress,
        )
    before = inputs.measure(inputs.model, progress=progress)
    after = inputs.measure(result.model, progress=progress)
    metrics = {
        "prunus": __version__,
        "base_model": model_name(model),
        "command": command or _command(model, out, ratio, recipe.scoring.method),
        "ratio": ratio,
        "parameters_before": inputs.geometry.total_parameters,
        "parameters_after": result.model.num_parameters(),
        "perplexity_before": before.perplexity if before else None,
        "perplexity_after": after.perplexity if after else None,
        "perplexity_text": inputs.text_name if after else None,
        "perplexity_protocol": after.protocol if after else None,
        "plan": result.plan.fingerprint,
        "compensation": asdict(compensation) if compensation else None,
        "seconds_to_prune": round(cost.seconds, 1),
        "peak_bytes": cost.peak_bytes,
        **{key: value for key, value in result.score.about.items() if key not in ("seconds", "peak_bytes")},
    }
    # A streamed model would be read from the disk once for every token.
    shown = report and inputs.engine == "resident"
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
    )
    if report:
        write_report(out)
    folder.remove()
    return metrics


def apply_checkpoint(
    model: str,
    plan: Plan,
    out: str | Path,
    *,
    model_options: ModelOptions | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Cut a model folder or Hub model by a plan and save the result; nothing is measured.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        plan: which groups stay.
        out: folder for the result.
        model_options: device and dtype.
        overwrite: replace an earlier result.
        command: what the user typed, for the model card.

    Returns:
        The metrics, as they are written to prunus/metrics.json.
    """
    model_options = model_options or ModelOptions()
    check_output(out, overwrite, model)
    dense, tokenizer, _ = load_or_open(model, model_options)
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
        "plan": plan.fingerprint,
    }
    return save_result(
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


def _command(model: str, out: str | Path, ratio: float, method: str) -> str:
    return f"prunus prune {shlex.quote(model)} --out {shlex.quote(str(out))} --ratio {ratio:g} --method {method}"
