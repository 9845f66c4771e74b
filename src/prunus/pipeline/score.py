"""The first half of the main job: calibrate, score, keep the table."""

from __future__ import annotations

from pathlib import Path

from prunus.files.outputs import check_output, claimed
from prunus.machine.processes import agreed, is_first
from prunus.pipeline.inputs import draw_calibration
from prunus.pipeline.job import Job
from prunus.pipeline.work_folder import WorkFolder
from prunus.scoring.adaptive import check_enough
from prunus.scoring.score import Score, score
from prunus.sweep.engine import config_of, load_or_open, settled
from prunus.sweep.estimate import Workload

__all__ = ["score_job"]


def score_job(
    job: Job, out: str | Path, *, overwrite: bool = False, command: str | None = None, progress: bool = True
) -> Score:
    """Score every group of a model as a job says, and save the table.

    Args:
        job: model, recipe, calibration text, and where it runs; its ratio is not read.
        out: folder for groups.csv, score.json and statistics.safetensors.
        overwrite: replace an earlier result.
        command: what the user typed, for others who want the same output.
        progress: show progress bars on a terminal.

    Returns:
        The scores, the same in every process of a distributed run; the first one has saved them.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder, as far as possible before any long work.
    """
    folder, scoring = WorkFolder(out, job.output.work), job.recipe.scoring
    with claimed(out, folder.path, run=("score", job, overwrite), command=command) as claim:
        if agreed(claim.finished):
            result = Score.load(out)
        else:
            check_output(out, overwrite, job.model, job.calibration.source)
            sequences = job.calibration.samples if scoring.needs_calibration else 0
            if scoring.method == "adaptive":
                check_enough(sequences)
            seq_len = job.calibration.length(config_of(job.model))
            workload = Workload(scoring.needs, sequences, seq_len)
            run = settled(job.model, job.run, workload, progress=progress)
            model, tokenizer, engine = load_or_open(job.model, run, workload, progress=progress)
            calibration, _ = draw_calibration(
                model, tokenizer, job.calibration, held_out=0, needed=scoring.needs_calibration, progress=progress
            )
            result = score(
                model,
                calibration,
                scoring,
                batch_size=run.sequences_per_pass,
                engine=engine,
                work=folder.used_by(engine),
                progress=progress,
            )
        if is_first():
            if not claim.finished:
                result.save(out, overwrite=overwrite)
            folder.remove()
    return result
