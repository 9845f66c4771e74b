"""What a model consists of, what a ratio would remove, and what was removed from a pruned folder. Reads no weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import empty_model, locate, read_config, whole_around
from prunus.errors import OptionError, PlanError
from prunus.model.families import Axis
from prunus.model.geometry import Geometry
from prunus.model.group import Group
from prunus.model.modules import submodule
from prunus.results.lineage import plan_from_original
from prunus.results.result_folder import routing_in
from prunus.scoring.score import Score
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, check_ratio, reachable_parameters

__all__ = ["geometry_of", "inspect", "inspect_group"]

#: what the groups of an axis are counted by in a config
WIDTH_NAMES: dict[Axis, str] = {
    "attention": "num_key_value_heads",
    "mlp": "intermediate_size",
    "expert": "num_experts",
}


def geometry_of(model: str) -> Geometry:
    """The shape of a model by its config alone.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.

    Raises:
        CheckpointError: there is no such model, or its config cannot be read.
        UnsupportedModelError: the family is not described.
    """
    return Geometry.of(empty_model(read_config(locate(model)), torch.float32))


def inspect(model: str, ratio: float | None = None) -> dict[str, Any]:
    """Describe a model by its config and the headers of its weights.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        ratio: also say what removing this share would mean.

    Returns:
        Plain values: family, parameters, groups per axis and their cost, widths per layer, and for a folder that
        prunus wrote, what was removed from each layer of the original model, and of a mixture of experts what its
        last cut did to the routing.

    Raises:
        OptionError: the ratio is none.
        CheckpointError: there is no such model, or its config cannot be read, or is not that of its weights.
        UnsupportedModelError: the family is not described.
    """
    if ratio is not None:
        check_ratio(ratio)
    folder = locate(model)
    geometry = geometry_of(model)
    family, whole = geometry.family, whole_around(folder)
    facts: dict[str, Any] = {
        "model": Path(model).name,
        "family": family.model_type,
        "family_title": family.title,
        "parameters": geometry.total_parameters,
        **(
            {"inside": whole.kind.title, "parameters_in_all": geometry.total_parameters + whole.parameters}
            if whole
            else {}
        ),
        "head_dim": geometry.head_dim,
        "query_heads_per_group": geometry.num_key_value_groups,
        "groups": {axis: sum(widths[axis] for widths in geometry.widths) for axis in geometry.axes},
        "parameters_per_group": dict(geometry.group_parameters),
        "prunable_parameters": reachable_parameters(geometry, Constraints()),
        "layers": [{WIDTH_NAMES[axis]: widths[axis] for axis in geometry.axes} for widths in geometry.widths],
    }
    if geometry.experts_per_token:
        facts["active_parameters"] = geometry.active_parameters
        facts["experts_per_token"] = geometry.experts_per_token
    if ratio is not None:
        target = ratio * geometry.total_parameters
        facts["ratio"] = {
            "ratio": ratio,
            "parameters_to_remove": round(target),
            "of_what_can_be_cut": target / max(facts["prunable_parameters"], 1),
        }
        if geometry.experts_per_token:
            facts["ratio"]["experts_if_only_experts"] = round(target / max(geometry.group_parameters["expert"], 1))
        else:
            facts["ratio"]["mlp_channels_if_only_mlp"] = round(target / max(geometry.group_parameters["mlp"], 1))
    if plan_file := plan_from_original(folder):
        plan = Plan.load(plan_file)
        facts["removed"] = [
            {
                "layer_idx": layer_idx,
                **{axis: before[axis] - len(kept[axis]) for axis in plan.axes},
                "of": {axis: before[axis] for axis in plan.axes},
            }
            for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True))
        ]
        if routing := routing_in(folder):
            facts["routing"] = routing
    return facts


def inspect_group(model: str, group: str, table: str | Path | None = None) -> dict[str, Any]:
    """Describe one group of a model: what is cut together, and what a table of scores says of it.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`; its weights are not read.
        group: `LAYER:AXIS:GROUP`.
        table: groups.csv of this model, or the folder that holds it.

    Returns:
        Plain values: cost, parts, and with a table importance, score, rank (1 = the first to be cut) and of how many.

    Raises:
        OptionError: the model has no such group, or the table says nothing about it.
        PlanError: the table is malformed, or of a model of another shape.
    """
    empty = empty_model(read_config(locate(model)), torch.float32)
    geometry = Geometry.of(empty)
    layers = submodule(empty, geometry.family.layers)
    named = {projection.path for projection in geometry.family.projections}
    # Of all layers: any of them may lack a block.
    modules = [pair for layer in layers for pair in layer.named_modules() if pair[0] in named]
    biases = frozenset(path for path, module in modules if module.bias is not None)
    stacks = {
        stack.path: tensor.numel() // tensor.shape[stack.dim] * geometry.unit(stack.space)
        for block in geometry.family.all_blocks
        for stack in block.stacks
        for layer in layers
        if (tensor := layer.state_dict(keep_vars=True).get(stack.path)) is not None
    }
    found = Group.parse(group, geometry, biases, stacks)
    parts = [{**asdict(part), "indices": part.indices} for part in found.parts()]
    facts: dict[str, Any] = {"group": group, "cost": found.cost, "parts": parts}
    if table is not None:
        scored = Score.load(table)
        if scored.geometry != geometry:
            raise PlanError(f"the table {table} is of a model of another shape; give one of {model}")
        rows = scored.table
        place = (rows["layer_idx"] == found.layer_idx) & (rows["group_type"] == found.axis)
        row = rows[place & (rows["group_idx"] == found.group_idx)]
        if row.empty:
            scores = " and ".join(sorted(set(rows["group_type"])))
            raise OptionError(f"the table {table} says nothing about {group}: it is of {scores} groups")
        facts |= {name: float(row[name].item()) for name in ("importance", "score")}
        facts |= {"rank": int(row.index.item()) + 1, "of": len(rows)}
    return facts
