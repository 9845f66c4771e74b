"""`prunus apply`: cut by a plan."""

from __future__ import annotations

from pathlib import Path

from prunus.cli.flags import Flag, ModelName
from prunus.cli.job_flags import NO_SAVE, SaveFlags
from prunus.cli.place_flags import NO_DEVICE, DeviceFlags, model_options

__all__ = ["apply"]

_COUNTED = ("parameters", "bytes", "layers", "experts")


def apply(
    model: ModelName,
    plan: Path,
    /,
    *,
    out: Path,
    device: DeviceFlags = NO_DEVICE,
    save: SaveFlags = NO_SAVE,
    text_only: Flag = False,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Cut a model by a plan and save the result; nothing is measured.

    A GGUF file becomes a smaller one: experts and whole layers are left out, everything else is copied as it is,
    whatever the quantisation.

    Args:
        model: folder, Hub id, `smollm2-135m`, or a GGUF file of the model that the plan is for.
        plan: plan.json, from `prunus plan` or from the folder prunus/ of a pruned model.
        out: folder for the result, or file if MODEL is a GGUF file; it appears when it is complete.
        text_only: of a multimodal model, save the language model by itself.
        overwrite: replace an earlier result.
        json: print the metrics as JSON.
    """
    from prunus.cli.printing import parameter_rows, print_json, print_rows, typed_command
    from prunus.export import apply_plan_to_gguf, is_gguf
    from prunus.files.outputs import check_inputs
    from prunus.pipeline.apply import apply_checkpoint
    from prunus.pipeline.inspection import geometry_of
    from prunus.selection.plan import Plan

    if is_gguf(model):
        facts = apply_plan_to_gguf(model, Plan.load(plan), out, overwrite=overwrite)
        if json:
            print_json(facts)
        else:
            counts = [(name, facts[f"{name}_before"], facts[f"{name}_after"]) for name in _COUNTED]
            rows = [(name, f"{before:,}", f"{after:,}") for name, before, after in counts if before]
            print_rows(f"{model} → {out}", ("", "before", "after"), rows)
        return
    check_inputs(out, plan)
    # With the model's shape, so that a plan for another one is refused before its ranges are unfolded.
    metrics = apply_checkpoint(
        model,
        Plan.load(plan, geometry_of(model)),
        out,
        model_options=model_options(device),
        save_dtype=save.save_dtype or "auto",
        text_only=text_only,
        overwrite=overwrite,
        command=typed_command(),
    )
    if json:
        print_json(metrics)
    else:
        print_rows(f"{metrics['base_model']} → {out}", ("", "before", "after"), parameter_rows(metrics))
