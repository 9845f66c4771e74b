"""`prunus compare`: several recipes at several ratios."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunus.cli.flags import Flag, ModelName, split_commas, split_numbers, split_whole_numbers
from prunus.cli.job_flags import (
    NO_CALIBRATION,
    NO_DEVICE,
    NO_EVALUATION,
    CalibrationFlags,
    DeviceFlags,
    EvaluationFlags,
    given,
)

__all__ = ["compare"]


def compare(
    model: ModelName,
    /,
    *,
    out: Path,
    ratios: Annotated[tuple[float, ...], Parameter(converter=split_numbers, negative="")],
    recipes: Annotated[tuple[str, ...], Parameter(converter=split_commas, negative="")] = ("default",),
    methods: Annotated[tuple[str, ...], Parameter(converter=split_commas, negative="")] = (),
    seeds: Annotated[tuple[int, ...], Parameter(converter=split_whole_numbers, negative="")] = (),
    set: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    calibration: CalibrationFlags = NO_CALIBRATION,
    evaluation: EvaluationFlags = NO_EVALUATION,
    device: DeviceFlags = NO_DEVICE,
    overwrite: Flag = False,
    dry_run: Flag = False,
    json: Flag = False,
) -> None:
    """Prune by several recipes at several ratios and measure each: a table and a report.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        out: folder for comparison.csv, comparison.json, the plans and report.html.
        ratios: shares of all parameters to remove, e.g. `0.1,0.2,0.4`.
        recipes: names or YAML files, e.g. `default,original,mine.yaml`.
        methods: run each recipe with each of these importance methods, e.g. `taylor,wanda`; methods of one kind share
            their pass over the sequences.
        seeds: draw the calibration sequences with each of these seeds, e.g. `0,1`.
        set: a setting for all recipes, e.g. `--set scoring.normalize=layer_sum`; `prunus recipe` lists the keys.
        overwrite: replace an earlier comparison in the folder.
        dry_run: say what would be removed, and what memory, disk and time it would take; nothing is written.
        json: print the rows as JSON.
    """
    from prunus.cli.forecast import show_forecast
    from prunus.cli.printing import print_json, print_rows, short, typed_command
    from prunus.pipeline.compare import compare as compare_recipes
    from prunus.pipeline.compare import forecast_compare
    from prunus.pipeline.job_file import read_job

    direct = {"model": model, **given(calibration, evaluation, device)}
    jobs = {
        Path(recipe).stem if Path(recipe).is_file() else recipe: read_job(recipe, set, direct) for recipe in recipes
    }
    named = {name: job.recipe for name, job in jobs.items()}
    if methods:
        alone = len(named) == 1
        named = {
            method if alone else f"{name}, {method}": recipe.by(method)
            for name, recipe in named.items()
            for method in methods
        }
    job = next(iter(jobs.values()))
    if dry_run:
        show_forecast(forecast_compare(job, named, ratios, out, seeds=seeds, overwrite=overwrite), json)
        return
    comparison = compare_recipes(job, named, ratios, out, seeds=seeds, overwrite=overwrite, command=typed_command())
    if json:
        print_json(jsonlib.loads(comparison.to_json(orient="records")))
        return
    comparison["peak_bytes"] = (comparison["peak_bytes"] / 2**20).round()
    rows = [tuple(short(value) for value in row) for row in comparison.itertuples(index=False)]
    print_rows(f"{model} → {out}", tuple(comparison.columns.str.replace("peak_bytes", "peak MiB")), rows)
