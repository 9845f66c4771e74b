"""What a model consists of, what a ratio would remove, and what was removed from a pruned folder. Reads no weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import empty_model, locate, read_config
from prunus.model.families import AXES, family_of
from prunus.model.geometry import Geometry
from prunus.results.lineage import plan_from_original
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, check_ratio, reachable_parameters

__all__ = ["inspect"]


def inspect(model: str, ratio: float | None = None) -> dict[str, Any]:
    """Describe a model by its config alone.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        ratio: also say what removing this share would mean.

    Returns:
        Plain values: family, parameters, groups per axis and their cost, widths per layer, and for a folder that
        prunus wrote, what was removed from each layer of the original model.

    Raises:
        OptionError: the ratio is none.
        CheckpointError: there is no such model, or its config cannot be read.
        UnsupportedModelError: the family is not described.
    """
    if ratio is not None:
        check_ratio(ratio)
    folder = locate(model)
    config = read_config(folder)
    family = family_of(config)
    geometry = Geometry.of(empty_model(config, torch.float32))
    facts: dict[str, Any] = {
        "model": Path(model).name,
        "family": family.model_type,
        "family_title": family.title,
        "parameters": geometry.total_parameters,
        "head_dim": geometry.head_dim,
        "query_heads_per_group": geometry.num_key_value_groups,
        "groups": {axis: sum(widths[axis] for widths in geometry.widths) for axis in AXES},
        "parameters_per_group": dict(geometry.group_parameters),
        "prunable_parameters": reachable_parameters(geometry, Constraints()),
        "layers": [asdict(widths) for widths in geometry.widths],
    }
    if ratio is not None:
        target = ratio * geometry.total_parameters
        facts["ratio"] = {
            "ratio": ratio,
            "parameters_to_remove": round(target),
            "of_what_can_be_cut": target / max(facts["prunable_parameters"], 1),
            "mlp_channels_if_only_mlp": round(target / max(geometry.group_parameters["mlp"], 1)),
        }
    if plan_file := plan_from_original(folder):
        plan = Plan.load(plan_file)
        facts["removed"] = [
            {
                "layer_idx": layer_idx,
                **{axis: before[axis] - len(kept[axis]) for axis in AXES},
                "of": {axis: before[axis] for axis in AXES},
            }
            for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True))
        ]
    return facts
