"""Several methods at several ratios on one model: one statistics pass per kind, one table, one plot."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from prunus.calibration import Calibration
from prunus.checkpoint import check_output, load_model
from prunus.compensation import CompensationOptions, compensate_
from prunus.errors import CalibrationError, OptionError
from prunus.evaluation.perplexity import read_text
from prunus.groups import Geometry
from prunus.importance import get_method, score_groups
from prunus.inputs import CalibrationOptions, EvaluationOptions, ModelOptions, draw_calibration, measure, text_name
from prunus.metering import Cost, metered
from prunus.packaged_model import resolve_model
from prunus.scoring import ScoringOptions, take_statistics
from prunus.selection import Constraints, check_ratio, check_reachable, select
from prunus.statistics import Statistics
from prunus.surgery import apply_plan
from prunus.table import build_table
from prunus.version import __version__

__all__ = ["compare", "plot_comparison"]

logger = logging.getLogger(__name__)

DENSE = "dense"


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
        evaluation: how the models are compared.
        model_options: device and dtype.
        overwrite: replace an earlier comparison.
        progress: show progress bars on a terminal.

    Returns:
        One row for the dense model and one per result, with the columns method, ratio, compensated, parameters,
        perplexity, relative (to dense), seconds and peak_bytes (of the pass that took the method's statistics, shared
        or not, of scoring, and of compensation).
    """
    calibration, scoring = calibration or CalibrationOptions(), scoring or ScoringOptions()
    evaluation, model_options = evaluation or EvaluationOptions(), model_options or ModelOptions()
    chosen = [get_method(name) for name in dict.fromkeys(methods)]
    if not chosen or not ratios:
        raise OptionError("compare needs at least one method and one ratio")
    if evaluation.eval_text is None and evaluation.held_out == 0:
        raise OptionError("compare measures perplexity: give an evaluation text, or hold out calibration sequences")
    for ratio in ratios:
        check_ratio(ratio)
    check_output(out, overwrite)
    text = read_text(evaluation.eval_text) if evaluation.eval_text else None
    dense, tokenizer = load_model(resolve_model(model), dtype=model_options.dtype, device=model_options.device)
    geometry = Geometry.of(dense)
    for ratio in ratios:
        check_reachable(geometry, ratio, constraints)
    sequences, held_out = draw_calibration(
        dense,
        tokenizer,
        calibration,
        held_out=0 if text else evaluation.held_out,
        needed=any(method.needs for method in chosen) or compensation is not None,
        progress=progress,
    )
    if text is None and held_out is None:
        raise CalibrationError("there is no text left to measure perplexity on; give an evaluation text")
    folder = Path(out)
    (folder / "plans").mkdir(parents=True, exist_ok=True)
    about = {
        "prunus": __version__,
        "model": Path(model).name,
        "calibration": sequences.provenance.to_dict() if sequences else None,
        "normalize": scoring.normalize,
    }
    passes = _passes(dense, sequences, [method.name for method in chosen], scoring, progress)

    def evaluate(candidate: Any) -> float:
        result = measure(candidate, tokenizer, text, held_out, evaluation, progress=progress)
        assert result is not None
        about["evaluation"] = {"text": text_name(evaluation, calibration), "protocol": result.protocol}
        return result.perplexity

    rows: list[dict[str, Any]] = [
        {
            "method": DENSE,
            "ratio": 0.0,
            "compensated": False,
            "parameters": geometry.total_parameters,
            "perplexity": evaluate(dense),
        }
    ]
    for method in chosen:
        statistics, cost = passes[method.name]
        with metered(dense.device) as scoring_cost:
            importance = score_groups(dense, method, statistics, replace(scoring, method=method.name))
            table = build_table(geometry, importance, scoring.normalize)
        for ratio in ratios:
            plan = select(table, geometry, ratio, constraints)
            plan.save(folder / "plans" / f"{method.name}-{ratio:g}.json")
            smaller = apply_plan(dense, plan)
            row = {
                "method": method.name,
                "ratio": ratio,
                "compensated": False,
                "parameters": smaller.num_parameters(),
                "perplexity": evaluate(smaller),
                "seconds": round(cost.seconds + scoring_cost.seconds, 1),
                "peak_bytes": max(filter(None, (cost.peak_bytes, scoring_cost.peak_bytes)), default=None),
            }
            rows.append(row)
            _write(folder, rows, about)
            if compensation is not None:
                assert sequences is not None
                batches = list(sequences.batches(scoring.batch_size))
                with metered(dense.device) as repair_cost:
                    compensate_(smaller, dense, plan, batches, compensation, progress=progress)
                rows.append(
                    {
                        **row,
                        "compensated": True,
                        "perplexity": evaluate(smaller),
                        "seconds": round(row["seconds"] + repair_cost.seconds, 1),
                        "peak_bytes": max(filter(None, (row["peak_bytes"], repair_cost.peak_bytes)), default=None),
                    }
                )
                _write(folder, rows, about)
    comparison = _write(folder, rows, about)
    plot_comparison(comparison, folder / "comparison.png")
    return comparison


def _passes(
    model: Any, sequences: Calibration | None, methods: Sequence[str], scoring: ScoringOptions, progress: bool
) -> dict[str, tuple[Statistics | None, Cost]]:
    """The statistics of each method, and what the pass that took them cost."""
    kinds: dict[str, list[str]] = {}
    for name in methods:
        needs = get_method(name).needs
        kind = "none" if not needs else "forward" if needs <= {"activations"} else "backward"
        kinds.setdefault(kind, []).append(name)
    passes: dict[str, tuple[Statistics | None, Cost]] = {}
    for names in kinds.values():
        with metered(model.device) as cost:
            statistics = take_statistics(model, sequences, names, scoring, progress=progress)
        passes |= dict.fromkeys(names, (statistics, cost))
    return passes


def _write(folder: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(
        rows, columns=["method", "ratio", "compensated", "parameters", "perplexity", "seconds", "peak_bytes"]
    )
    frame.insert(5, "relative", frame["perplexity"] / frame["perplexity"].iloc[0])
    frame.to_csv(folder / "comparison.csv", index=False)
    records = json.loads(frame.to_json(orient="records"))
    (folder / "comparison.json").write_text(json.dumps({**about, "rows": records}, indent=1) + "\n", encoding="utf-8")
    return frame


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
