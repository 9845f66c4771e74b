"""`prunus prune`: from a model to a smaller one, in one go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunus.cli.flags import Flag
from prunus.cli.job_flags import (
    NO_CALIBRATION,
    NO_DEVICE,
    NO_EVALUATION,
    NO_FILE,
    NO_FIT,
    NO_PASSES,
    NO_SAVE,
    NO_SCORING,
    NO_SELECTION,
    UNLISTED,
    CalibrationFlags,
    DeviceFlags,
    EvaluationFlags,
    FileFlags,
    FitFlags,
    PassFlags,
    SaveFlags,
    ScoringFlags,
    SelectionFlags,
    given,
)
from prunus.errors import OptionError

__all__ = ["prune"]


def prune(
    model: Annotated[str | None, Parameter(name="MODEL")] = None,
    /,
    *,
    out: Path,
    ratio: float | None = None,
    experts: float | None = None,
    fit: FitFlags = NO_FIT,
    file: FileFlags = NO_FILE,
    scoring: ScoringFlags = NO_SCORING,
    selection: SelectionFlags = NO_SELECTION,
    rounds: Annotated[int | None, UNLISTED] = None,
    calibration: CalibrationFlags = NO_CALIBRATION,
    evaluation: EvaluationFlags = NO_EVALUATION,
    device: DeviceFlags = NO_DEVICE,
    passes: PassFlags = NO_PASSES,
    save: SaveFlags = NO_SAVE,
    text_only: Annotated[Flag, UNLISTED] = False,
    overwrite: Flag = False,
    dry_run: Flag = False,
    json: Flag = False,
) -> None:
    """Prune a model and save the smaller one: score, select, cut, repair and measure in one go.

    The default recipe was chosen by measurement (benchmarks/RESULTS.md). `prunus recipe` lists every setting.

    Args:
        model: folder, Hub id or `smollm2-135m`; optional with the --recipe of an earlier result.
        out: folder for the result; it appears when it is complete.
        ratio: share of all parameters to remove, or of what --target says, from 0 to below 1; 0.25 by default. Of a
            multimodal model, a share of its language model's parameters.
        experts: share of the experts to remove from each layer of a mixture of experts, e.g. 0.5, in place of --ratio.
        rounds: number of prune–repair steps of equal size, with re-scoring in between.
        text_only: of a multimodal model, save the language model by itself.
        overwrite: replace an earlier result in the folder.
        dry_run: say what would be removed, and what memory, disk and time it would take; nothing is written.
        json: print the metrics as JSON.
    """
    from prunus.cli.forecast import show_forecast
    from prunus.cli.printing import print_json, typed_command
    from prunus.cli.prune_result import show_result
    from prunus.pipeline.job import DEFAULT_RATIO
    from prunus.pipeline.job_file import read_job
    from prunus.pipeline.prune import forecast_prune, prune_job
    from prunus.selection.fit import FitOptions

    size = given(fit)
    amounts = {"ratio": ratio is not None, "experts": experts is not None, "fit": bool(fit.fit or fit.fit_memory)}
    if sum(amounts.values()) > 1:
        both = [f"`{name}`" for name, typed in amounts.items() if typed]
        raise OptionError(f"{' and '.join(both)} both say how much to remove; give one of them")
    if experts is not None:
        ratio = DEFAULT_RATIO  # in place of that of the recipe's file
    direct = {"model": model, "ratio": ratio, "experts": experts, "rounds": rounds, **size}
    direct |= given(scoring, selection, calibration, evaluation, device, passes, save)
    if text_only:
        direct["output.text_only"] = True
    job = read_job(file.recipe, file.set, direct)
    if ratio is not None:
        job = replace(job, fit=FitOptions())  # that of the recipe's file
    if dry_run:
        show_forecast(forecast_prune(job, out, overwrite=overwrite), json)
        return
    metrics = prune_job(job, out, overwrite=overwrite, command=typed_command())
    if json:
        print_json(metrics)
        return
    show_result(metrics, out, job.model)
