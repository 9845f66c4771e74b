"""Several methods at several ratios on one model: one statistics pass per kind, one table, one plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from prunus.calibration import Batch, Calibration
from prunus.calibration.self_text import text_for_repair
from prunus.errors import CalibrationError, OptionError
from prunus.files.replacing import replacing
from prunus.machine.metering import Cost, metered
from prunus.model.geometry import Geometry
from prunus.pipeline.inputs import CalibrationOptions, EvaluationOptions, Inputs, ModelOptions, model_name, open_inputs
from prunus.pipeline.prune import prune
from prunus.pipeline.recipe import Recipe
from prunus.repair.compensation import CompensationOptions, Cut, compensate_together_
from prunus.report import write_report
from prunus.report.comparison_plot import DENSE, plot_comparison
from prunus.scoring.score import Score, ScoringOptions, score_together
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, select
from prunus.selection.targets import TargetOptions
from prunus.surgery import apply_plan
from prunus.sweep.estimate import bytes_of_a_cut, free_memory, parse_bytes
from prunus.version import __version__

__all__ = ["compare", "cuts_at_once"]

COLUMNS = ("method", "ratio", "compensated", "parameters", "perplexity", "relative", "seconds", "peak_bytes")


def compare(
    model: str,
    methods: Sequence[str],
    ratios: Sequence[float],
    out: str | Path,
    *,
    calibration: CalibrationOptions | None = None,
    scoring: ScoringOptions | None = None,
    constraints: Constraints | None = None,
    target: TargetOptions | None = None,
    compensation: CompensationOptions | None = None,
    rounds: int = 1,
    evaluation: EvaluationOptions | None = None,
    model_options: ModelOptions | None = None,
    overwrite: bool = False,
    command: str | None = None,
    report: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Prune a model by every method at every ratio and measure each result.

    Methods that need the same kind of pass share it: one with a backward pass, one without. Results with the same plan
    are made and measured once, and with one round and without reselection several are repaired in one go: as many as
    fit into half of the free memory, see `cuts_at_once`. The rows that are done are on disk after each measurement.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        methods: importance methods.
        ratios: shares of all parameters (or of what `target` says) to remove.
        out: folder for comparison.csv, comparison.json, comparison.png and the plans.
        calibration: the text that importance is measured on.
        scoring: normalisation and method options; its `method` is not read.
        constraints: what may be cut.
        target: what the ratios are shares of; default: parameters.
        compensation: also measure each result with the remaining weights repaired; None = plain slicing only.
        rounds: cut in so many parts, see `prunus.prune`.
        evaluation: how the models are compared.
        model_options: device and dtype.
        overwrite: replace an earlier comparison.
        command: what the user typed, for the record.
        report: also write report.html.
        progress: show progress bars on a terminal.

    Returns:
        One row for the dense model and one per result, with the columns method, ratio, compensated, parameters,
        perplexity, relative (to dense), seconds and peak_bytes (of all passes that led to the result, shared or not).
    """
    evaluation, model_options = evaluation or EvaluationOptions(), model_options or ModelOptions()
    recipe = Recipe.of(scoring, constraints, target, compensation, rounds)
    recipes = [recipe.by(method) for method in dict.fromkeys(methods)]
    if not recipes or not ratios:
        raise OptionError("compare needs at least one method and one ratio")
    if evaluation.eval_text is None and evaluation.held_out == 0:
        raise OptionError("compare measures perplexity: give an evaluation text, or hold out calibration sequences")
    inputs = open_inputs(
        model,
        out,
        ratios,
        recipes,
        calibration or CalibrationOptions(),
        evaluation,
        model_options,
        save_model=False,
        overwrite=overwrite,
        progress=progress,
    )
    if not inputs.measurable:
        raise CalibrationError("there is no text left to measure perplexity on; give an evaluation text")
    about = {
        "prunus": __version__,
        "model": model_name(model),
        "command": command,
        "calibration": inputs.calibration.provenance.to_dict() if inputs.calibration else None,
        "normalize": recipe.scoring.normalize,
        "target": recipe.target.to_dict(),
        "rounds": rounds,
    }
    repaired = [False] if compensation is None else [False, True]
    wanted = [_Row(e.scoring.method, ratio, repair) for e, ratio, repair in product(recipes, ratios, repaired)]
    base = _Row(DENSE, 0.0, False)
    record = _Record(inputs, Path(out), about, [base, *wanted], progress)
    record.add(inputs.model, [base])
    shared = _share(inputs, recipes, ratios, progress)
    if rounds == 1 and not recipe.reselects:
        _compare_plans(record, shared, model_options.max_memory)
    else:
        for each, ratio, repair in product(recipes, ratios, repaired):
            _add_result(record, shared, each if repair else replace(each, compensation=None), ratio)
    plot_comparison(record.frame, Path(out) / "comparison.png")
    if report:
        write_report(out)
    return record.frame


@dataclass(frozen=True)
class _Shared:
    """What the results of a comparison are made from.

    Attributes:
        recipes: one for each method.
        ratios: the shares that each cuts.
        scores: by method; taken once.
        text: of all repairs; None where there are none.
        writing: what it cost to make.
    """

    recipes: Sequence[Recipe]
    ratios: Sequence[float]
    scores: Mapping[str, Score]
    text: Calibration | None
    writing: Cost


def _share(inputs: Inputs, recipes: Sequence[Recipe], ratios: Sequence[float], progress: bool) -> _Shared:
    """Take the scores of all methods, in as few passes as they allow, and make the text of the repairs."""
    recipe = recipes[0]
    ways = [replace(each.scoring, engine=inputs.engine) for each in recipes]
    found = score_together(inputs.model, inputs.calibration, ways, curvature=recipe.reselects, progress=progress)
    text = None
    with metered(inputs.model.device) as writing:
        if recipe.compensation is not None and inputs.calibration is not None:
            seed = recipe.scoring.random_seed
            text = text_for_repair(inputs.model, inputs.calibration, recipe.compensation, seed=seed, progress=progress)
    scores = {way.method: scored for way, scored in zip(ways, found, strict=True)}
    return _Shared(recipes, ratios, scores, text, writing)


def _compare_plans(record: _Record, shared: _Shared, max_memory: str | None) -> None:
    """Cut once by every plan that the tables lead to, and repair several cuts in one go.

    Results with the same plan are the same model: it is made and measured once, for all of them.
    """
    inputs, dense, recipe = record.inputs, record.inputs.model, shared.recipes[0]
    plans: dict[str, Plan] = {}
    wanted: dict[str, list[tuple[str, float]]] = {}
    costs = recipe.target.costs(inputs.geometry)
    for (method, scored), ratio in product(shared.scores.items(), shared.ratios):
        plan = select(scored.table, inputs.geometry, ratio, recipe.constraints, costs)
        plans[plan.fingerprint] = plan
        wanted.setdefault(plan.fingerprint, []).append((method, ratio))

    def add(cut: Cut, compensated: bool, seconds: float, peak_bytes: int | None) -> None:
        rows = []
        for method, ratio in wanted[cut.plan.fingerprint]:
            about = shared.scores[method].about
            row = _Row(
                method, ratio, compensated, about["seconds"] + seconds, _largest(about["peak_bytes"], peak_bytes)
            )
            record.keep_plan(cut.plan, row)
            rows.append(row)
        record.add(cut.pruned, rows)

    each_plan = list(plans.values())
    batches: list[Batch] = []
    at_once = 1
    if shared.text is not None:
        batches = list(shared.text.batches(recipe.scoring.batch_size))
        tokens = shared.text.input_ids.numel()
        limit = parse_bytes(max_memory) if max_memory else None
        at_once = cuts_at_once(dense, each_plan, tokens, free_memory(dense.device, limit))
    for first in range(0, len(each_plan), at_once):
        cuts: list[Cut] = []
        seconds = []
        for plan in each_plan[first : first + at_once]:
            with metered(dense.device) as cost:
                cuts.append(Cut(apply_plan(dense, plan), plan))
            seconds.append(cost.seconds)
            add(cuts[-1], False, cost.seconds, cost.peak_bytes)
        if recipe.compensation is not None:
            with metered(dense.device) as cost:
                repaired = compensate_together_(cuts, dense, batches, recipe.compensation, progress=record.progress)
            for cut, before, found in zip(cuts, seconds, repaired, strict=True):
                seconds_of_repair = shared.writing.seconds + found.seconds
                add(cut, True, before + seconds_of_repair, _largest(shared.writing.peak_bytes, cost.peak_bytes))


def cuts_at_once(dense: Any, plans: Sequence[Plan], tokens: int, free: int | None) -> int:
    """How many cuts are repaired in one go: as many as fit into half of the free memory, and one at least.

    Args:
        dense: the model before the cuts.
        plans: the cuts.
        tokens: that they are repaired on.
        free: memory that may still be taken, in bytes; None = not known: one at a time.
    """
    if free is None or not plans:
        return 1
    geometry = Geometry.of(dense)
    largest = max(geometry.parameters_left(plan.kept_widths) for plan in plans)
    return max(1, min(len(plans), free // 2 // bytes_of_a_cut(dense, largest, tokens)))


def _add_result(record: _Record, shared: _Shared, recipe: Recipe, ratio: float) -> None:
    """Prune in one way, keep the plan, and measure."""
    inputs, method, repairs = record.inputs, recipe.scoring.method, recipe.compensation is not None
    scored = shared.scores[method]
    with metered(inputs.model.device) as cost:
        result = prune(
            inputs.model,
            ratio,
            inputs.calibration,
            scoring=replace(recipe.scoring, engine=inputs.engine),
            constraints=recipe.constraints,
            target=recipe.target,
            compensation=recipe.compensation,
            rounds=recipe.rounds,
            scored=scored,
            repair_text=shared.text,
            progress=record.progress,
        )
    costs = [cost, shared.writing] if repairs else [cost]
    seconds = scored.about["seconds"] + sum(each.seconds for each in costs)
    peak_bytes = _largest(scored.about["peak_bytes"], *(each.peak_bytes for each in costs))
    row = _Row(method, ratio, repairs, seconds, peak_bytes)
    record.keep_plan(result.plan, row)
    record.add(result.model, [row])


def _largest(*peaks: int | None) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)


@dataclass(frozen=True)
class _Row:
    """What a measurement is of."""

    method: str
    ratio: float
    compensated: bool
    seconds: float | None = None
    peak_bytes: int | None = None


class _Record:
    """The rows so far, which are on disk after each measurement."""

    def __init__(self, inputs: Inputs, folder: Path, about: Mapping[str, Any], wanted: Iterable[_Row], progress: bool):
        self.inputs, self.folder, self.progress = inputs, folder, progress
        self._order = {(row.method, row.ratio, row.compensated): number for number, row in enumerate(wanted)}
        self._about = dict(about)
        self._rows: list[dict[str, Any]] = []

    def keep_plan(self, plan: Plan, row: _Row) -> None:
        """Write the plan of a row."""
        (self.folder / "plans").mkdir(parents=True, exist_ok=True)
        suffix = "-compensated" if row.compensated else ""
        plan.save(self.folder / "plans" / f"{row.method}-{row.ratio:g}{suffix}.json")

    def add(self, model: Any, rows: Sequence[_Row]) -> None:
        """Measure a model once, and write the rows that it is the result of."""
        result = self.inputs.measure(model, progress=self.progress)
        assert result is not None
        self._about["evaluation"] = {"text": self.inputs.text_name, "protocol": result.protocol}
        for row in rows:
            seconds = None if row.seconds is None else round(row.seconds, 1)
            measured = {"parameters": model.num_parameters(), "perplexity": result.perplexity}
            self._rows.append({**asdict(row), "seconds": seconds, **measured})
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "comparison.csv") as partial:
            self.frame.to_csv(partial, index=False)
        records = json.loads(self.frame.to_json(orient="records"))
        with replacing(self.folder / "comparison.json") as partial:
            partial.write_text(json.dumps({**self._about, "rows": records}, indent=1) + "\n", encoding="utf-8")

    @property
    def frame(self) -> pd.DataFrame:
        """One row per result, in the order in which they were asked for; the dense model first."""
        rows = sorted(self._rows, key=lambda row: self._order[row["method"], row["ratio"], row["compensated"]])
        frame = pd.DataFrame(rows, columns=[column for column in COLUMNS if column != "relative"])
        frame["relative"] = frame["perplexity"] / frame["perplexity"].iloc[0]
        return frame[list(COLUMNS)]
