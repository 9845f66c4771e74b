"""Several recipes at several ratios on one model: shared passes, one table, one report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from prunus.calibration import Calibration
from prunus.calibration.batches import hash_tokens
from prunus.errors import CalibrationError, OptionError
from prunus.files.csv_file import read_table
from prunus.files.outputs import claimed, output_folder
from prunus.machine.byte_sizes import parse_bytes
from prunus.machine.metering import metered
from prunus.machine.stages import Stages
from prunus.model.digest import digest_model
from prunus.model.geometry import Geometry
from prunus.pipeline.comparison_record import ComparisonRecord, Row
from prunus.pipeline.cutting import Passes, cut, repair_seed
from prunus.pipeline.forecast import Forecast, begun, forecast
from prunus.pipeline.inputs import Inputs, open_inputs
from prunus.pipeline.job import Job
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import Request, check_request
from prunus.pipeline.stages import comparing, scoring
from prunus.pipeline.work_folder import WorkFolder
from prunus.repair.block_repair import Cut, repair_together_
from prunus.report import try_report
from prunus.results.comparison import DENSE, plan_name
from prunus.scoring.score import Score, score_together
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints
from prunus.surgery import apply_plan
from prunus.sweep.engine import model_name
from prunus.sweep.estimate import bytes_of_a_cut, free_memory
from prunus.version import __version__

__all__ = ["compare", "cuts_at_once", "forecast_compare"]

logger = logging.getLogger(__name__)


def compare(
    job: Job,
    recipes: Mapping[str, Recipe],
    ratios: Sequence[float],
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Prune a model by every recipe at every ratio, with every seed, and measure each result.

    Recipes whose methods need the same kind of pass share it: one with a backward pass, one without. Results with the
    same plan are made and measured once, and repairs of recipes in one round run together: as many as fit into half of
    the free memory, see `cuts_at_once`. The folder appears when all is measured. Until then each row is kept in
    `<out>.work`, and a comparison of the same model and texts that was stopped goes on after them.

    Args:
        job: the model, its texts, and where it runs; its recipe and ratio are not read.
        recipes: by name.
        ratios: shares of all parameters (or of what a recipe's target says) to remove.
        out: folder for comparison.csv, comparison.json, the plans and report.html.
        seeds: of the calibration sequences; by default the job's own.
        overwrite: replace an earlier comparison.
        command: what the user typed, for the record.
        progress: show progress bars on a terminal.

    Returns:
        For each seed one row for the dense model and one per result, with the columns recipe, ratio, seed, parameters,
        perplexity, relative (to dense), seconds and peak_bytes (of all passes that led to the result, shared or not),
        and the accuracy on each zero-shot task of the evaluation.

    Raises:
        OptionError: nothing to compare, or a recipe that cannot work.
        CalibrationError: there is no text to measure perplexity on.
    """
    _check(job, recipes, ratios)
    seeds = list(dict.fromkeys(seeds or [job.calibration.seed]))
    ratios = list(dict.fromkeys(ratios))
    job = replace(job, calibration=replace(job.calibration, seed=seeds[0]))
    asked = "compare", job, recipes, tuple(ratios), tuple(seeds), overwrite
    folder = WorkFolder(out)
    with claimed(out, folder.path, run=asked, command=command) as claim:
        if not claim.finished:
            request = _request(job, recipes, ratios, out, seeds, overwrite)
            job = request.job
            recipes = dict(zip(recipes, request.recipes, strict=True))
            plain = {name: _plain(recipe) for name, recipe in recipes.items()}
            stages = begun(request, progress)
            inputs = open_inputs(request, stages)
            if not inputs.measurable:
                raise CalibrationError("there is no text left to measure perplexity on; give an evaluation text")
            about_run = {
                "prunus": __version__,
                "compute_dtype": job.run.dtype,
                "saved_dtype": job.output.save_dtype,
            }
            about = {
                **about_run,
                "model": model_name(job.model),
                "command": command,
                "calibration": inputs.calibration.provenance.to_dict() if inputs.calibration else None,
                "recipes": plain,
            }
            record, weights = ComparisonRecord(folder.path, plain), digest_model(inputs.model)
            with _shown_if_lost(record, folder.path):
                for seed in seeds:
                    with stages.enter(comparing(seed, seeds)):
                        if seed != seeds[0]:
                            drawn = replace(job.calibration, seed=seed)
                            inputs = inputs.with_texts(request, drawn, progress=progress)
                        facts = {"weights": weights, **about_run, **_texts(inputs)}
                        record.go_on(facts, seed, ratios)
                        _compare_with(inputs, job, recipes, ratios, record, seed, stages)
            with output_folder(out, overwrite=overwrite) as place:
                record.write(place, about)
        if job.output.report:
            try_report(out)
        folder.remove()
    return read_table(claim.path / "comparison.csv", ["recipe"])


def forecast_compare(
    job: Job,
    recipes: Mapping[str, Recipe],
    ratios: Sequence[float],
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Forecast:
    """What `compare` would remove, and what it would take; nothing is written.

    Raises:
        PrunusError: see `compare`.
    """
    _check(job, recipes, ratios)
    return forecast(_request(job, recipes, ratios, out, list(seeds or [job.calibration.seed]), overwrite))


def _check(job: Job, recipes: Mapping[str, Recipe], ratios: Sequence[float]) -> None:
    if not recipes or not ratios or DENSE in recipes:
        raise OptionError(f"compare needs at least one recipe and one ratio, and no recipe can be called {DENSE}")
    files: dict[str, str] = {}
    for name in recipes:
        if (other := files.setdefault(plan_name(name, 0, 0), name)) != name:
            raise OptionError(f"the plans of {other} and {name} would have one name; give the recipe files others")
    if job.evaluation.text is None and job.evaluation.held_out == 0:
        raise OptionError("compare measures perplexity: give an evaluation text, or hold out calibration sequences")


def _request(
    job: Job,
    recipes: Mapping[str, Recipe],
    ratios: Sequence[float],
    out: str | Path,
    seeds: Sequence[int],
    overwrite: bool,
) -> Request:
    request = check_request(job, out, ratios=ratios, recipes=list(recipes.values()), saves=False, overwrite=overwrite)
    return replace(request, seeds=seeds)


def _texts(inputs: Inputs) -> dict[str, Any]:
    """What the sequences are that a comparison scores, repairs and measures on."""
    calibration, held_out, text = inputs.calibration, inputs.held_out, inputs.text
    return {
        "calibration": calibration.provenance.sha256 if calibration else None,
        "held out": held_out.provenance.sha256 if held_out else None,
        "text": hash_tokens(text.ids) if text else None,
        "tasks": [[task.task.name, task.pairs, [item.gold for item in task.items]] for task in inputs.tasks],
    }


@contextmanager
def _shown_if_lost(record: ComparisonRecord, work: Path) -> Iterator[None]:
    """What was measured is worth something though the rest of a comparison fails."""
    try:
        yield
    except BaseException:
        if len(record):
            logger.warning(
                "the comparison stopped; the same command goes on after these rows, which are kept in %s\n%s",
                work,
                record.frame.to_csv(index=False).rstrip(),
            )
        raise


def _compare_with(
    inputs: Inputs,
    job: Job,
    recipes: Mapping[str, Recipe],
    ratios: Sequence[float],
    record: ComparisonRecord,
    seed: int,
    stages: Stages,
) -> None:
    """All rows of one drawing of the calibration sequences that are not there yet."""
    passes = Passes(job.run.sequences_per_pass, inputs.engine, stages=stages, seed=seed)
    if (dense := Row(DENSE, 0.0, seed)) not in record:
        record.add(inputs, inputs.model, [dense], progress=passes.progress)
    missing = {name: [ratio for ratio in ratios if Row(name, ratio, seed) not in record] for name in recipes}
    recipes = {name: recipe for name, recipe in recipes.items() if missing[name]}
    if not recipes:
        return
    ways = [recipe.scoring for recipe in recipes.values()]
    with stages.enter(scoring(1, 1)):
        scores = score_together(
            inputs.model,
            inputs.calibration,
            ways,
            batch_size=passes.batch_size,
            engine=passes.engine,
            seed=seed,
            progress=passes.progress,
        )
    parts = zip(recipes, recipes.values(), scores, [missing[name] for name in recipes], strict=True)
    shared = [_Shared(*each) for each in parts]
    at_once = [one for one in shared if len(one.recipe.steps(0.0)) == 1]
    # A repair and the seed of its random tokens: what cuts must have in common to share a walk.
    kinds = dict.fromkeys((one.recipe.repair, one.recipe.scoring.random_seed) for one in at_once)
    for kind in kinds:
        alike = [one for one in at_once if (one.recipe.repair, one.recipe.scoring.random_seed) == kind]
        _cut_together(inputs, job, alike, record, seed, stages)
    for one in shared:
        for ratio in one.ratios if one not in at_once else ():
            with metered(inputs.model.device) as cost:
                result = cut(inputs.model, ratio, one.score, one.recipe, passes, inputs.calibration)
            row = one.row(ratio, seed, cost.seconds, cost.peak_bytes)
            record.add(inputs, result.model, [row], result.plan, progress=passes.progress)


@dataclass(frozen=True, eq=False)
class _Shared:
    """What the results of one recipe are made from.

    Attributes:
        name: of the recipe.
        recipe: itself.
        score: of the dense model.
        ratios: that are missing.
    """

    name: str
    recipe: Recipe
    score: Score
    ratios: Sequence[float]

    def row(self, ratio: float, seed: int, seconds: float, peak_bytes: int | None) -> Row:
        """A row with the cost of all that led to it."""
        about = self.score.about
        peaks = [peak for peak in (about["peak_bytes"], peak_bytes) if peak is not None]
        return Row(self.name, ratio, seed, about["seconds"] + seconds, max(peaks, default=None))


def _cut_together(
    inputs: Inputs, job: Job, alike: Sequence[_Shared], record: ComparisonRecord, seed: int, stages: Stages
) -> None:
    """Results of recipes in one round with the same repair.

    Results with the same plan are the same model: it is made and measured once, for all of them.
    """
    dense, repair, text = inputs.model, alike[0].recipe.repair, inputs.calibration
    plans: dict[str, Plan] = {}
    wanted: dict[str, list[tuple[_Shared, float]]] = {}
    for one in alike:
        recipe = one.recipe
        for ratio in one.ratios:
            plan = one.score.plan(ratio, recipe.selection, recipe.target.costs(inputs.geometry))
            plans[plan.fingerprint] = plan
            wanted.setdefault(plan.fingerprint, []).append((one, ratio))

    def add(done: Cut, seconds: float, peak_bytes: int | None) -> None:
        rows = [one.row(ratio, seed, seconds, peak_bytes) for one, ratio in wanted[done.plan.fingerprint]]
        record.add(inputs, done.pruned, rows, done.plan, progress=stages.progress)

    each_plan = list(plans.values())
    at_once = len(each_plan) if repair is None else _at_once(inputs, job, each_plan, text)
    for first in range(0, len(each_plan), at_once):
        cuts, costs = [], []
        for plan in each_plan[first : first + at_once]:
            with metered(dense.device) as cost:
                done = Cut(apply_plan(dense, plan), plan)
            if repair is None:
                add(done, cost.seconds, cost.peak_bytes)
            else:
                cuts.append(done)
                costs.append(cost)
        if repair is not None and text is not None:
            batches = list(text.batches(job.run.sequences_per_pass))
            with stages.enter(f"{len(cuts)} repairs"), metered(dense.device) as shared:
                draws = repair_seed(inputs.calibration, alike[0].recipe)
                repaired = repair_together_(cuts, dense, batches, repair, seed=draws, progress=stages.progress)
            for done, cost, found in zip(cuts, costs, repaired, strict=True):
                add(done, cost.seconds + found.seconds, shared.peak_bytes)


def _at_once(inputs: Inputs, job: Job, plans: Sequence[Plan], text: Calibration | None) -> int:
    limit = parse_bytes(job.run.max_memory) if job.run.max_memory else None
    tokens = 0 if text is None else text.input_ids.numel()
    sources = 1 if text is None else len(text.each_source())
    return cuts_at_once(inputs.model, plans, tokens, free_memory(inputs.model.device, limit), sources)


def cuts_at_once(dense: Any, plans: Sequence[Plan], tokens: int, free: int | None, sources: int = 1) -> int:
    """How many cuts are repaired in one go: as many as fit into half of the free memory, and one at least.

    Args:
        dense: the model before the cuts.
        plans: the cuts.
        tokens: that they are repaired on.
        free: memory that may still be taken, in bytes; None = not known: one at a time.
        sources: of the tokens.
    """
    if free is None or not plans:
        return 1
    geometry = Geometry.of(dense)
    largest = max(geometry.parameters_left(plan.kept_widths) for plan in plans)
    return max(1, min(len(plans), free // 2 // bytes_of_a_cut(dense, largest, tokens, sources)))


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values."""
    selection = {field.name: getattr(recipe.selection, field.name) for field in fields(Constraints)}
    return {**asdict(recipe), "selection": selection, "target": recipe.target.to_dict()}
