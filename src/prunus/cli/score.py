"""`prunus score`: the table of all groups."""

from __future__ import annotations

from pathlib import Path

from prunus.cli.flags import Flag, ModelName
from prunus.cli.job_flags import (
    NO_CALIBRATION,
    NO_DEVICE,
    NO_FILE,
    NO_PASSES,
    NO_SCORING,
    CalibrationFlags,
    DeviceFlags,
    FileFlags,
    PassFlags,
    ScoringFlags,
    given,
)

__all__ = ["score"]


def score(
    model: ModelName,
    /,
    *,
    out: Path,
    file: FileFlags = NO_FILE,
    scoring: ScoringFlags = NO_SCORING,
    calibration: CalibrationFlags = NO_CALIBRATION,
    device: DeviceFlags = NO_DEVICE,
    passes: PassFlags = NO_PASSES,
    overwrite: Flag = False,
    dry_run: Flag = False,
    json: Flag = False,
) -> None:
    """Score every group of a model: writes groups.csv and what it was made from.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        out: folder for groups.csv, score.json and statistics.safetensors.
        overwrite: replace an earlier result in the folder.
        dry_run: say what memory and time it would take; nothing is written.
        json: print what was done as JSON.
    """
    from prunus.cli.forecast import show_forecast
    from prunus.cli.printing import print_json, print_rows, short, typed_command
    from prunus.machine.processes import is_first, joined
    from prunus.pipeline.job_file import read_job
    from prunus.pipeline.score import forecast_score, score_job

    direct = {"model": model, **given(scoring, calibration, device, passes)}
    job = read_job(file.recipe, file.set, direct, command="prunus score")
    if dry_run:
        show_forecast(forecast_score(job, out, overwrite=overwrite), json)
        return
    with joined():
        result = score_job(job, out, overwrite=overwrite, command=typed_command())
        first = is_first()
    if not first:
        return
    if json:
        print_json({"groups": len(result.table), **result.about})
        return
    shown = [*result.table.head(5).itertuples(index=False), None, *result.table.tail(5).itertuples(index=False)]
    rows = [("…",) * 6 if row is None else tuple(short(value) for value in row) for row in shown]
    print_rows(f"{len(result.table):,} groups, cheapest first → {out}", tuple(result.table.columns), rows)
