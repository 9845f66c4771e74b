"""`prunus apply`: cut by a plan."""

from __future__ import annotations

from pathlib import Path

from prunus.cli.flags import Flag, ModelName
from prunus.cli.option_flags import ModelFlags, Where
from prunus.cli.printing import print_json, print_rows, typed_command
from prunus.files.outputs import check_inputs
from prunus.pipeline.inspection import geometry_of
from prunus.pipeline.prune import apply_checkpoint
from prunus.selection.plan import Plan

__all__ = ["apply"]


def apply(
    model: ModelName,
    plan: Path,
    /,
    *,
    out: Path,
    where: ModelFlags = Where(),
    save_dtype: str = "auto",
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Cut a model by a plan and save the result; nothing is measured.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        plan: plan.json, from `prunus plan` or from the folder prunus/ of a pruned model.
        out: folder for the result; it appears when it is complete.
        save_dtype: float32, bfloat16 or float16, to save the result in; auto is the checkpoint's own.
        overwrite: replace an earlier result in the folder.
        json: print the metrics as JSON.
    """
    check_inputs(out, plan)
    # With the model's shape, so that a plan for another one is refused before its ranges are unfolded.
    metrics = apply_checkpoint(
        model,
        Plan.load(plan, geometry_of(model)),
        out,
        model_options=where,
        save_dtype=save_dtype,
        overwrite=overwrite,
        command=typed_command(),
    )
    if json:
        print_json(metrics)
    else:
        before, after = metrics["parameters_before"], metrics["parameters_after"]
        print_rows(
            f"{metrics['base_model']} → {out}", ("", "before", "after"), [("parameters", f"{before:,}", f"{after:,}")]
        )
