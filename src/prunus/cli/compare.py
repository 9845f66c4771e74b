"""`prunus compare`: several methods at several ratios."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunus.cli.flags import (
    COMPENSATION,
    CalibrationFlags,
    CompensationFlags,
    EvaluationFlags,
    Flag,
    ModelFlags,
    ModelName,
    Rounds,
    Scoring,
    ScoringFlags,
    Selection,
    SelectionFlags,
    Target,
    TargetFlags,
    seeded,
    split_commas,
    split_numbers,
)
from prunus.cli.printing import print_json, print_rows, short, typed_command
from prunus.pipeline.compare import compare as compare_methods
from prunus.pipeline.inputs import CalibrationOptions, EvaluationOptions, ModelOptions
from prunus.repair.compensation import CompensationOptions

__all__ = ["compare"]


def compare(
    model: ModelName,
    /,
    *,
    methods: Annotated[tuple[str, ...], Parameter(converter=split_commas, negative="")],
    ratios: Annotated[tuple[float, ...], Parameter(converter=split_numbers, negative="")],
    out: Path,
    calibration: CalibrationFlags = CalibrationOptions(),
    scoring: ScoringFlags = Scoring(),
    selection: SelectionFlags = Selection(),
    target: TargetFlags = Target(),
    compensate: Annotated[bool, Parameter(group=COMPENSATION)] = False,
    compensation: CompensationFlags = CompensationOptions(),
    rounds: Rounds = 1,
    evaluation: EvaluationFlags = EvaluationOptions(),
    where: ModelFlags = ModelOptions(),
    report: bool = True,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Prune by several methods at several ratios and measure each: a table and a plot.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        methods: importance methods, e.g. `taylor,wanda`; methods of one kind share their statistics pass.
        ratios: shares of all parameters to remove, or of what --target says, e.g. `0.1,0.2,0.4`.
        out: folder for comparison.csv, comparison.json, comparison.png and the plans.
        compensate: measure each result also with the remaining weights repaired by least squares.
        rounds: cut in so many equal parts, scoring what is left (and repaired) before each next one.
        report: write report.html.
        overwrite: replace an earlier comparison in the folder.
        json: print the rows as JSON.
    """
    comparison = compare_methods(
        model,
        methods,
        ratios,
        out,
        calibration=calibration,
        scoring=seeded(scoring, calibration),
        constraints=selection,
        target=target,
        compensation=compensation if compensate else None,
        rounds=rounds,
        evaluation=evaluation,
        model_options=where,
        overwrite=overwrite,
        command=typed_command(),
        report=report,
    )
    if json:
        print_json(jsonlib.loads(comparison.to_json(orient="records")))
        return
    comparison["peak_bytes"] = (comparison["peak_bytes"] / 2**20).round()
    rows = [tuple(short(value) for value in row) for row in comparison.itertuples(index=False)]
    print_rows(f"{model} → {out}", tuple(comparison.columns.str.replace("peak_bytes", "peak MiB")), rows)
