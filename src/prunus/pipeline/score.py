"""The first half of the main job: calibrate, score, keep the table."""

from __future__ import annotations

from pathlib import Path

from prunus.files.outputs import claimed
from prunus.machine.processes import agreed, is_first
from prunus.pipeline.forecast import Forecast, begun, forecast
from prunus.pipeline.inputs import open_inputs
from prunus.pipeline.job import Job
from prunus.pipeline.request import Request, check_score_request
from prunus.pipeline.stages import scoring
from prunus.pipeline.work_folder import WorkFolder
from prunus.scoring.score import Score, score

__all__ = ["forecast_score", "score_job"]


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
    folder = WorkFolder(out, job.output.work)
    with claimed(out, folder.path, run=("score", job, overwrite), command=command) as claim:
        if agreed(claim.finished):
            result = Score.load(out)
        else:
            request = check_score_request(job, out, work=folder.path, overwrite=overwrite)
            result = _scored(request, folder, progress)
        if is_first():
            if not claim.finished:
                result.save(out, overwrite=overwrite)
            folder.remove()
    return result


def forecast_score(job: Job, out: str | Path, *, overwrite: bool = False) -> Forecast:
    """What `score_job` would take; nothing is written.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder, as far as weights need not be read.
    """
    return forecast(check_score_request(job, out, work=WorkFolder(out, job.output.work).path, overwrite=overwrite))


def _scored(request: Request, folder: WorkFolder, progress: bool) -> Score:
    job = request.job
    stages = begun(request, progress)
    inputs = open_inputs(request, stages)
    with stages.enter(scoring(1, 1)):
        return score(
            inputs.model,
            inputs.calibration,
            job.recipe.scoring,
            batch_size=job.run.sequences_per_pass,
            engine=inputs.engine,
            work=folder.used_by(inputs.engine),
            seed=job.calibration.seed,
            progress=progress,
        )
