"""Several recipes at several ratios on one model: shared passes, one table, one report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from prunus.calibration import Calibration
from prunus.errors import CalibrationError, OptionError
from prunus.files.outputs import claimed, output_folder, whole_file
from prunus.machine.byte_sizes import parse_bytes
from prunus.machine.metering import metered
from prunus.machine.stages import Stages
from prunus.model.geometry import Geometry
from prunus.pipeline.cutting import Passes, cut, repair_seed
from prunus.pipeline.forecast import Forecast, begun, forecast
from prunus.pipeline.inputs import Inputs, open_inputs
from prunus.pipeline.job import Job
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import Request, check_request
from prunus.pipeline.stages import comparing, scoring
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

COLUMNS = ("recipe", "ratio", "seed", "parameters", "perplexity", "relative", "seconds", "peak_bytes")


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
    the free memory, see `cuts_at_once`. The folder appears when all is measured; if something fails before, the rows
    that were done are shown.

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
    job = replace(job, calibration=replace(job.calibration, seed=seeds[0]))
    asked = "compare", job, recipes, tuple(ratios), tuple(seeds), overwrite
    with claimed(out, run=asked, command=command) as claim:
        if not claim.finished:
            request = _request(job, recipes, ratios, out, seeds, overwrite)
            job = request.job
            recipes = dict(zip(recipes, request.recipes, strict=True))
            stages = begun(request, progress)
            inputs = open_inputs(request, stages)
            if not inputs.measurable:
                raise CalibrationError("there is no text left to measure perplexity on; give an evaluation text")
            about = {
                "prunus": __version__,
                "model": model_name(job.model),
                "command": command,
                "calibration": inputs.calibration.provenance.to_dict() if inputs.calibration else None,
                "compute_dtype": job.run.dtype,
                "saved_dtype": job.output.save_dtype,
                "recipes": {name: _plain(recipe) for name, recipe in recipes.items()},
            }
            with output_folder(out, overwrite=overwrite) as place:
                record = _Record(place, about, [DENSE, *recipes], stages)
                with _shown_if_lost(record):
                    for seed in seeds:
                        with stages.enter(comparing(seed, seeds)):
                            if seed != seeds[0]:
                                drawn = replace(job.calibration, seed=seed)
                                inputs = inputs.with_texts(request, drawn, progress=progress)
                            _compare_with(inputs, job, recipes, ratios, record, seed)
        if job.output.report:
            try_report(out)
    return pd.read_csv(claim.path / "comparison.csv", float_precision="round_trip")


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


@contextmanager
def _shown_if_lost(record: _Record) -> Iterator[None]:
    """What was measured is worth something though the rest of a comparison fails."""
    try:
        yield
    except BaseException:
        if len(record):
            logger.warning("the comparison stopped; it had measured\n%s", record.frame.to_csv(index=False).rstrip())
        raise


def _compare_with(
    inputs: Inputs, job: Job, recipes: Mapping[str, Recipe], ratios: Sequence[float], record: _Record, seed: int
) -> None:
    """All rows of one drawing of the calibration sequences."""
    stages = record.stages
    passes = Passes(job.run.sequences_per_pass, inputs.engine, stages=stages)
    record.add(inputs, inputs.model, [_Row(DENSE, 0.0, seed)])
    ways = [recipe.scoring for recipe in recipes.values()]
    with stages.enter(scoring(1, 1)):
        scores = score_together(
            inputs.model,
            inputs.calibration,
            ways,
            batch_size=passes.batch_size,
            engine=passes.engine,
            progress=passes.progress,
        )
    shared = [_Shared(*each) for each in zip(recipes, recipes.values(), scores, strict=True)]
    at_once = [one for one in shared if len(one.recipe.steps(0.0)) == 1]
    # A repair and the seed of its random tokens: what cuts must have in common to share a walk.
    kinds = dict.fromkeys((one.recipe.repair, one.recipe.scoring.random_seed) for one in at_once)
    for kind in kinds:
        alike = [one for one in at_once if (one.recipe.repair, one.recipe.scoring.random_seed) == kind]
        _cut_together(inputs, job, alike, ratios, record, seed)
    for one, ratio in product([one for one in shared if one not in at_once], ratios):
        with metered(inputs.model.device) as cost:
            result = cut(inputs.model, ratio, one.score, one.recipe, passes, inputs.calibration)
        row = one.row(ratio, seed, cost.seconds, cost.peak_bytes)
        record.keep_plan(result.plan, row)
        record.add(inputs, result.model, [row])


@dataclass(frozen=True, eq=False)
class _Shared:
    """What the results of one recipe are made from.

    Attributes:
        name: of the recipe.
        recipe: itself.
        score: of the dense model.
    """

    name: str
    recipe: Recipe
    score: Score

    def row(self, ratio: float, seed: int, seconds: float, peak_bytes: int | None) -> _Row:
        """A row with the cost of all that led to it."""
        about = self.score.about
        peaks = [peak for peak in (about["peak_bytes"], peak_bytes) if peak is not None]
        return _Row(self.name, ratio, seed, about["seconds"] + seconds, max(peaks, default=None))


def _cut_together(
    inputs: Inputs, job: Job, alike: Sequence[_Shared], ratios: Sequence[float], record: _Record, seed: int
) -> None:
    """Results of recipes in one round with the same repair.

    Results with the same plan are the same model: it is made and measured once, for all of them.
    """
    dense, repair, text = inputs.model, alike[0].recipe.repair, inputs.calibration
    plans: dict[str, Plan] = {}
    wanted: dict[str, list[tuple[_Shared, float]]] = {}
    for one, ratio in product(alike, ratios):
        recipe = one.recipe
        plan = one.score.plan(ratio, recipe.selection, recipe.target.costs(inputs.geometry))
        plans[plan.fingerprint] = plan
        wanted.setdefault(plan.fingerprint, []).append((one, ratio))

    def add(done: Cut, seconds: float, peak_bytes: int | None) -> None:
        rows = [one.row(ratio, seed, seconds, peak_bytes) for one, ratio in wanted[done.plan.fingerprint]]
        for row in rows:
            record.keep_plan(done.plan, row)
        record.add(inputs, done.pruned, rows)

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
            with record.stages.enter(f"{len(cuts)} repairs"), metered(dense.device) as shared:
                draws = repair_seed(inputs.calibration, alike[0].recipe)
                repaired = repair_together_(cuts, dense, batches, repair, seed=draws, progress=record.stages.progress)
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


@dataclass(frozen=True)
class _Row:
    """What a measurement is of."""

    recipe: str
    ratio: float
    seed: int
    seconds: float | None = None
    peak_bytes: int | None = None


class _Record:
    """The rows so far, which are on disk after each measurement."""

    def __init__(self, folder: Path, about: Mapping[str, Any], names: Iterable[str], stages: Stages):
        self.folder, self.stages = folder, stages
        self._order = {name: number for number, name in enumerate(names)}
        self._about = dict(about)
        self._rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def keep_plan(self, plan: Plan, row: _Row) -> None:
        """Write the plan of a row."""
        (self.folder / "plans").mkdir(parents=True, exist_ok=True)
        plan.save(self.folder / "plans" / plan_name(row.recipe, row.ratio, row.seed))

    def add(self, inputs: Inputs, model: Any, rows: Sequence[_Row]) -> None:
        """Measure a model once, and write the rows that it is the result of."""
        result, _ = inputs.measure(model, progress=self.stages.progress)
        assert result is not None
        accuracies = inputs.accuracies(model)
        self._about["evaluation"] = {"text": inputs.text_name, "protocol": result.protocol}
        for row in rows:
            seconds = None if row.seconds is None else round(row.seconds, 1)
            measured = {"parameters": model.num_parameters(), "perplexity": result.perplexity, **accuracies}
            self._rows.append({**asdict(row), "seconds": seconds, **measured})
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "comparison.csv") as partial:
            self.frame.to_csv(partial, index=False)
        records = json.loads(self.frame.to_json(orient="records"))
        with whole_file(self.folder / "comparison.json") as partial:
            partial.write_text(json.dumps({**self._about, "rows": records}, indent=1) + "\n", encoding="utf-8")

    @property
    def frame(self) -> pd.DataFrame:
        """One row per result, by seed, recipe as they were given, and ratio; the dense model first."""
        rows = sorted(self._rows, key=lambda row: (row["seed"], self._order[row["recipe"]], row["ratio"]))
        frame = pd.DataFrame(rows)
        dense = {row["seed"]: row["perplexity"] for row in rows if row["recipe"] == DENSE}
        frame["relative"] = frame["perplexity"] / frame["seed"].map(dense)
        return frame[[*COLUMNS, *(column for column in frame.columns if column not in COLUMNS)]]
