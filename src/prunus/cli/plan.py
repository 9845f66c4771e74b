"""`prunus plan`: from a table to a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from prunus.cli.flags import Flag
from prunus.cli.job_flags import NO_FILE, NO_SELECTION, FileFlags, SelectionFlags, given

__all__ = ["plan"]


def plan(
    table: Path,
    /,
    *,
    ratio: float,
    out: Path = Path("plan.json"),
    normalize: Literal["none", "layer_sum", "layer_mean"] | None = None,
    file: FileFlags = NO_FILE,
    selection: SelectionFlags = NO_SELECTION,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Choose what to cut from a table of scores; needs no model.

    Args:
        table: groups.csv, or a folder that `prunus score` or `prunus prune` wrote.
        ratio: share of all parameters to remove, or of what --target says, in [0, 1). Without --target it is what the
            table was made for.
        out: the plan file to write.
        normalize: make importances of different layers comparable in another way than when they were scored.
        overwrite: replace an existing file.
        json: print a summary as JSON.
    """
    from prunus.cli.printing import print_json, print_rows
    from prunus.files.outputs import check_output_file, output_file
    from prunus.pipeline.job import Job
    from prunus.pipeline.job_file import PRESETS, read_job
    from prunus.pipeline.recipe import Recipe
    from prunus.scoring.score import Score
    from prunus.selection.plan import MARK

    check_output_file(out, "plan.json", MARK, overwrite)
    result = Score.load(table)
    preset = file.recipe in PRESETS
    start = PRESETS[str(file.recipe)]() if preset else Recipe()
    if selection.target is None:  # another target has a context and a phase of its own
        start = replace(start, target=result.target)
    direct, base = given(selection), Job("", recipe=start)
    recipe = read_job(None if preset else file.recipe, file.set, direct, base=base, command="prunus plan").recipe
    costs = recipe.target.costs(result.geometry)
    if normalize is not None:
        result = result.ranked(normalize)
    chosen = result.plan(ratio, recipe.selection, costs)
    with output_file(out, "plan.json", MARK, overwrite=overwrite) as partial:
        partial.write_text(chosen.to_json(), encoding="utf-8")
    left = result.geometry.parameters_left(chosen.kept_widths)
    facts = {
        "parameters_before": result.geometry.total_parameters,
        "parameters_after": left,
        "removed": 1 - left / result.geometry.total_parameters,
        "ratio": ratio,
        "achieved_ratio": 1 - costs.left(chosen.kept_widths) / (costs.total or 1),
        "quantity": costs.quantity,
        "quantity_before": costs.total,
        "quantity_after": costs.left(chosen.kept_widths),
        "layers_left": len(chosen.surviving_layers),
        "fingerprint": chosen.fingerprint,
    }
    if json:
        print_json(facts)
        return
    rows = [
        (str(layer_idx), *(f"{len(kept[axis])} of {before[axis]}" for axis in chosen.axes))
        for layer_idx, (before, kept) in enumerate(zip(chosen.widths, chosen.layers, strict=True))
    ]
    title = f"{facts['achieved_ratio']:.2%} of all {costs.quantity} removed ({ratio:.2%} requested) → {out}"
    print_rows(title, ("layer", *chosen.axes), rows)
