"""A plan for a model of Hugging Face, carried out on a GGUF file of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from prunus.errors import PlanError, UnsupportedModelError
from prunus.export.gguf_slice import slice_gguf, trunk_layers
from prunus.export.gguf_source import GgufSource, open_gguf
from prunus.export.llama_cpp import GGUF_NAMES
from prunus.files.user_path import expanded
from prunus.model.families import Axis
from prunus.selection.plan import Plan

__all__ = ["apply_plan_to_gguf"]

_AXES: tuple[Any, ...] = get_args(Axis)
#: what GGUF calls the width of an axis
_WIDTHS = {"attention": "attention.head_count_kv", "mlp": "feed_forward_length", "expert": "expert_count"}


def apply_plan_to_gguf(
    path: str | Path, plan: Plan, out: str | Path, *, overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Cut the experts and whole layers that a plan removes out of a GGUF file of the model that it was made for.

    Args:
        path: the GGUF file, of any quantisation.
        plan: it may remove experts and whole layers, and nothing else.
        out: the file to write; complete or not there at all.
        overwrite: replace an earlier GGUF file.
        progress: show a bar on a terminal.

    Returns:
        As `slice_gguf`.

    Raises:
        PlanError: the plan is for another model.
        UnsupportedModelError: the plan removes a part of the attention groups or MLP channels of a layer that stays.
        CheckpointError: see `slice_gguf`, like all others.
    """
    source = open_gguf(expanded(path))
    _check_fits(source, plan)
    layers = plan.surviving_layers
    for layer in layers:
        for axis in _AXES:
            if axis == "expert":
                continue
            before, kept = plan.widths[layer][axis], len(plan.layers[layer][axis])
            if kept < before:
                raise UnsupportedModelError(
                    f"layer {layer}: the plan keeps {kept} of {before} {axis} groups, which cannot be cut out of a "
                    "GGUF file: they lie across its quantised blocks. Apply the plan to the Hugging Face folder, and "
                    "write that with `prunus export --to gguf`"
                )
    experts = {
        layer: plan.layers[layer][axis]
        for axis in _AXES
        if axis == "expert"
        for layer in layers
        if plan.widths[layer][axis]
    }
    return slice_gguf(source, out, experts, layers, overwrite=overwrite, progress=progress)


def _check_fits(source: GgufSource, plan: Plan) -> None:
    names = GGUF_NAMES.get(plan.model_type, ())
    if source.architecture not in names:
        known = f"a GGUF file of one is of architecture {' or '.join(names)}" if names else "no name of it is known"
        raise PlanError(
            f"the plan is for family {plan.model_type!r}, the file is of architecture {source.architecture!r}; {known}"
        )
    count = trunk_layers(source)
    if len(plan.layers) != count:
        raise PlanError(f"the plan is for {len(plan.layers)} decoder layers, {source.path} has {count}")
    further = source.number("nextn_predict_layers") or 0
    for axis in _AXES:
        widths = source.numbers(_WIDTHS[axis], count + further)
        if widths is None or (axis == "mlp" and source.number("expert_count")):
            continue  # a mixture's MLP channels are those of shared experts, which have fields of their own
        for layer, planned in enumerate(plan.widths):
            found = widths[layer]
            if planned[axis] and planned[axis] != found:
                raise PlanError(f"layer {layer}: the plan is for {planned[axis]} {axis} groups, the file has {found}")
