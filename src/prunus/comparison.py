"""Several methods at several ratios on one model: one statistics pass per kind, one table, one plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from prunus.compensation import CompensationOptions
from prunus.errors import CalibrationError, OptionError
from prunus.inputs import CalibrationOptions, EvaluationOptions, Inputs, ModelOptions, model_name, open_inputs
from prunus.metering import metered
from prunus.pipeline import prune
from prunus.recipe import check_recipe
from prunus.replacing import replacing
from prunus.scoring import Score, ScoringOptions, score_together
from prunus.selection import Constraints
from prunus.sweep.estimate import Workload
from prunus.version import __version__

__all__ = ["compare", "plot_comparison"]

DENSE = "dense"
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
    compensation: CompensationOptions | None = None,
    rounds: int = 1,
    evaluation: EvaluationOptions | None = None,
    model_options: ModelOptions | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Prune a model by every method at every ratio and measure each result.

    Methods that need the same kind of pass share it: one with a backward pass, one without. The rows that are done are
    on disk after each measurement.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        methods: importance methods.
        ratios: shares of all parameters to remove.
        out: folder for comparison.csv, comparison.json, comparison.png and the plans.
        calibration: the text that importance is measured on.
        scoring: normalisation and method options; its `method` is not read.
        constraints: what may be cut.
        compensation: also measure each result with the remaining weights repaired; None = plain slicing only.
        rounds: cut in so many parts, see `prunus.prune`.
        evaluation: how the models are compared.
        model_options: device and dtype.
        overwrite: replace an earlier comparison.
        progress: show progress bars on a terminal.

    Returns:
        One row for the dense model and one per result, with the columns method, ratio, compensated, parameters,
        perplexity, relative (to dense), seconds and peak_bytes (of all passes that led to the result, shared or not).
    """
    calibration, scoring = calibration or CalibrationOptions(), scoring or ScoringOptions()
    evaluation = evaluation or EvaluationOptions()
    each = [replace(scoring, method=name) for name in dict.fromkeys(methods)]
    if not each or not ratios:
        raise OptionError("compare needs at least one method and one ratio")
    if evaluation.eval_text is None and evaluation.held_out == 0:
        raise OptionError("compare measures perplexity: give an evaluation text, or hold out calibration sequences")
    calibrate = compensation is not None or any(options.needs_calibration for options in each)
    sequences = calibration.samples if calibrate else None
    for options, ratio in product(each, ratios):
        check_recipe(ratio, options, constraints, compensation, rounds, sequences=sequences)
    inputs = open_inputs(
        model,
        out,
        ratios,
        constraints,
        calibration,
        evaluation,
        model_options or ModelOptions(),
        engine=scoring.engine,
        workload=Workload(
            frozenset().union(*(options.needs for options in each)),
            batch_size=scoring.batch_size,
            compensate=compensation is not None,
            inputs_on_disk=False,
        ),
        calibrate=calibrate,
        save_model=False,
        overwrite=overwrite,
        progress=progress,
    )
    each = [replace(options, engine=inputs.engine) for options in each]
    if not inputs.measurable:
        raise CalibrationError("there is no text left to measure perplexity on; give an evaluation text")
    about = {
        "prunus": __version__,
        "model": model_name(model),
        "calibration": inputs.calibration.provenance.to_dict() if inputs.calibration else None,
        "normalize": scoring.normalize,
        "rounds": rounds,
    }
    record = _Record(inputs, Path(out), about, progress)
    record.add(inputs.model, method=DENSE, ratio=0.0, compensated=False)
    curvature = compensation is not None and compensation.reselect
    found = score_together(inputs.model, inputs.calibration, each, curvature=curvature, progress=progress)
    scores = {options.method: scored for options, scored in zip(each, found, strict=True)}
    repairs = [None, compensation] if compensation is not None else [None]
    for options in each:
        for ratio in ratios:
            for repair in repairs:
                _add_result(record, scores[options.method], options, ratio, constraints, repair, rounds)
    plot_comparison(record.frame, Path(out) / "comparison.png")
    return record.frame


def _add_result(
    record: _Record,
    scored: Score,
    options: ScoringOptions,
    ratio: float,
    constraints: Constraints | None,
    repair: CompensationOptions | None,
    rounds: int,
) -> None:
    """Prune in one way, keep the plan, and measure."""
    inputs = record.inputs
    with metered(inputs.model.device) as cost:
        result = prune(
            inputs.model,
            ratio,
            inputs.calibration,
            scoring=options,
            constraints=constraints,
            compensation=repair,
            rounds=rounds,
            scored=scored,
            progress=record.progress,
        )
    suffix = "-compensated" if repair else ""
    (record.folder / "plans").mkdir(parents=True, exist_ok=True)
    result.plan.save(record.folder / "plans" / f"{options.method}-{ratio:g}{suffix}.json")
    peaks = [peak for peak in (scored.about["peak_bytes"], cost.peak_bytes) if peak is not None]
    record.add(
        result.model,
        method=options.method,
        ratio=ratio,
        compensated=repair is not None,
        seconds=round(scored.about["seconds"] + cost.seconds, 1),
        peak_bytes=max(peaks, default=None),
    )


class _Record:
    """The rows so far, which are on disk after each measurement."""

    def __init__(self, inputs: Inputs, folder: Path, about: Mapping[str, Any], progress: bool):
        self.inputs, self.folder, self.progress = inputs, folder, progress
        self._about = dict(about)
        self._rows: list[dict[str, Any]] = []

    def add(self, model: Any, **row: Any) -> None:
        """Measure a model and write its row."""
        result = self.inputs.measure(model, progress=self.progress)
        assert result is not None
        self._about["evaluation"] = {"text": self.inputs.text_name, "protocol": result.protocol}
        self._rows.append({**row, "parameters": model.num_parameters(), "perplexity": result.perplexity})
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "comparison.csv") as partial:
            self.frame.to_csv(partial, index=False)
        records = json.loads(self.frame.to_json(orient="records"))
        with replacing(self.folder / "comparison.json") as partial:
            partial.write_text(json.dumps({**self._about, "rows": records}, indent=1) + "\n", encoding="utf-8")

    @property
    def frame(self) -> pd.DataFrame:
        """One row per measurement."""
        frame = pd.DataFrame(self._rows, columns=[column for column in COLUMNS if column != "relative"])
        frame["relative"] = frame["perplexity"] / frame["perplexity"].iloc[0]
        return frame[list(COLUMNS)]


def plot_comparison(comparison: pd.DataFrame, path: str | Path) -> None:
    """Draw perplexity over the removed share, and the time and peak memory of each method.

    Args:
        comparison: what `compare` returns.
        path: the PNG to write.
    """
    methods = [name for name in comparison["method"].unique() if name != DENSE]
    dense = float(comparison.loc[comparison["method"] == DENSE, "perplexity"].iloc[0])
    # Figure without pyplot: no global state, and no need for a display.
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    curve, time, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for (name, compensated), rows in comparison[comparison["method"] != DENSE].groupby(
        ["method", "compensated"], sort=False
    ):
        rows = rows.sort_values("ratio")
        curve.plot(
            [0.0, *rows["ratio"] * 100],
            [dense, *rows["perplexity"]],
            marker="o",
            linestyle="--" if compensated else "-",
            color=f"C{methods.index(name)}",
            label=f"{name}, compensated" if compensated else name,
        )
    curve.axhline(dense, color="grey", linewidth=1, linestyle=":")
    curve.set(yscale="log", xlabel="parameters removed (%)", ylabel="perplexity", title="Quality")
    curve.legend()
    firsts = comparison[comparison["method"] != DENSE].drop_duplicates("method")
    time.barh(firsts["method"], firsts["seconds"].fillna(0))
    time.set(xlabel="seconds", title="Time to score")
    memory.barh(firsts["method"], firsts["peak_bytes"].fillna(0) / 2**30)
    memory.set(xlabel="GiB", title="Peak memory while scoring")
    for axes in (time, memory):
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
