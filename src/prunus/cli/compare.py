"""`prunus compare`: several recipes at several ratios."""

from __future__ import annotations

import json as jsonlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prunus.cli.flags import Flag, ModelName, split_commas, split_numbers, split_whole_numbers
from prunus.cli.job_flags import (
    NO_CALIBRATION,
    NO_DEVICE,
    NO_EVALUATION,
    NO_PASSES,
    NO_SAVE,
    CalibrationFlags,
    DeviceFlags,
    EvaluationFlags,
    PassFlags,
    SaveFlags,
    given,
)
from prunus.errors import OptionError

if TYPE_CHECKING:
    from prunus.pipeline.job import Job

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
    passes: PassFlags = NO_PASSES,
    save: SaveFlags = NO_SAVE,
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

    direct = {"model": model, **given(calibration, evaluation, device, passes, save)}
    jobs = read_jobs(recipes, set, direct)
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


def read_jobs(recipes: Sequence[str], settings: Sequence[str], direct: Mapping[str, object]) -> dict[str, Job]:
    """The jobs of recipes by their names: of a file the first part of its name, or its path where another has that.

    Raises:
        OptionError: files that would be measured under other conditions than the first one, or see `Sheet.read`.
    """
    from prunus.pipeline.job_file import JOB, read_job

    stems = {recipe: Path(recipe).stem if Path(recipe).is_file() else recipe for recipe in dict.fromkeys(recipes)}
    names = Counter(stems.values())
    jobs = {
        stem if names[stem] == 1 else recipe: read_job(recipe, settings, direct, command="prunus compare")
        for recipe, stem in stems.items()
    }
    first, *others = jobs
    for name in others:
        for part in ("calibration", "evaluation", "run", "output"):
            one, other = getattr(jobs[first], part), getattr(jobs[name], part)
            for field in fields(one):
                values = [getattr(each, field.name) for each in (one, other)]
                if values[0] != values[1] and JOB.is_used(f"{part}.{field.name}", "prunus compare"):
                    shown = [JOB.keys[f"{part}.{field.name}"].plain(value) for value in values]
                    raise OptionError(
                        f"{part}.{field.name} is {shown[0]} in {first} and {shown[1]} in {name}, and all recipes are "
                        f"measured alike: give it with `{part}.{field.name}=VALUE`"
                    )
    return jobs
