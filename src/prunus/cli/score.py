"""`prunus score`: the table of all groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prunus.checkpoint import check_output
from prunus.cli.flags import CalibrationFlags, Flag, ModelFlags, ModelName, Scoring, ScoringFlags, seeded
from prunus.cli.printing import print_json, print_rows, short
from prunus.machine.processes import is_first, joined
from prunus.pipeline.inputs import CalibrationOptions, ModelOptions, draw_calibration, load_or_open
from prunus.pipeline.work_folder import WorkFolder
from prunus.scoring.score import score as score_model
from prunus.sweep.estimate import Workload

__all__ = ["score"]


def score(
    model: ModelName,
    /,
    *,
    out: Path,
    calibration: CalibrationFlags = CalibrationOptions(),
    scoring: ScoringFlags = Scoring(),
    where: ModelFlags = ModelOptions(),
    work: Path | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Score every group of a model: writes groups.csv and what it was made from.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        out: folder for groups.csv, score.json and statistics.safetensors.
        work: folder from which a killed run goes on when the same command is given again; by default OUT.work, with the
            streamed engine only. Removed at the end.
        overwrite: replace an earlier result in the folder.
        json: print what was done as JSON.
    """
    check_output(out, overwrite, model)
    folder = WorkFolder(out, work)
    needed = scoring.needs_calibration
    sequences = calibration.samples if needed else 0
    workload = Workload(scoring.needs, sequences, calibration.seq_len, scoring.batch_size)
    with joined():
        live, tokenizer, engine = load_or_open(model, where, scoring.engine, workload)
        drawn, _ = draw_calibration(live, tokenizer, calibration, held_out=0, needed=needed)
        options = replace(seeded(scoring, calibration), engine=engine)
        result = score_model(live, drawn, options, work=folder.used_by(engine))
        first = is_first()
    if not first:
        return
    result.save(out)
    folder.remove()
    if json:
        print_json({"groups": len(result.table), **result.about})
        return
    shown = [*result.table.head(5).itertuples(index=False), None, *result.table.tail(5).itertuples(index=False)]
    rows = [("…",) * 6 if row is None else tuple(short(value) for value in row) for row in shown]
    print_rows(f"{len(result.table):,} groups, cheapest first → {out}", tuple(result.table.columns), rows)
