"""`prunus prune`: from a model to a smaller one, in one go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from prunus.cli.flags import Flag
from prunus.cli.job_flags import (
    NO_CALIBRATION,
    NO_DEVICE,
    NO_EVALUATION,
    NO_RECIPE,
    CalibrationFlags,
    DeviceFlags,
    EvaluationFlags,
    RecipeFlags,
    given,
)

__all__ = ["prune"]


def prune(
    model: Annotated[str | None, Parameter(name="MODEL")] = None,
    /,
    *,
    out: Path,
    ratio: float | None = None,
    recipe: RecipeFlags = NO_RECIPE,
    calibration: CalibrationFlags = NO_CALIBRATION,
    evaluation: EvaluationFlags = NO_EVALUATION,
    device: DeviceFlags = NO_DEVICE,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Prune a model and save the smaller one: score, select, cut, repair and measure in one go.

    The default recipe is the best that was measured, see benchmarks/RESULTS.md. `prunus recipe` lists every setting.

    Args:
        model: folder, Hub id or `smollm2-135m`; a recipe file of an earlier result knows its own.
        out: folder for the result; it appears when it is complete.
        ratio: share of all parameters to remove, or of what --target says, from 0 to below 1; 0.25 by default.
        overwrite: replace an earlier result in the folder.
        json: print the metrics as JSON.
    """
    from prunus.cli.printing import print_json, print_rows, typed_command
    from prunus.pipeline.job_file import read_job
    from prunus.pipeline.prune import prune_job

    direct = {"model": model, "ratio": ratio, **given(recipe, calibration, evaluation, device)}
    job = read_job(recipe.recipe, recipe.set, direct)
    metrics = prune_job(job, out, overwrite=overwrite, command=typed_command())
    if json:
        print_json(metrics)
        return
    print_rows(
        f"{metrics['base_model']} → {out}",
        ("", "before", "after"),
        [
            ("parameters", f"{metrics['parameters_before']:,}", f"{metrics['parameters_after']:,}"),
            *_target_row(metrics["target"]),
            ("removed", f"{metrics['ratio']:.1%} asked", f"{metrics['achieved_ratio']:.1%}"),
            *_perplexity_row(metrics),
        ],
    )


def _target_row(target: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if target["target"] == "params":
        return []
    return [(target["quantity"], f"{target['before']:,.0f}", f"{target['after']:,.0f}")]


def _perplexity_row(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if metrics["perplexity_after"] is None:
        return []
    before, after = metrics["perplexity_before"], metrics["perplexity_after"]
    return [(f"perplexity, {metrics['perplexity_text']}", f"{before:.2f}", f"{after:.2f}")]
