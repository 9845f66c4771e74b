"""Chance."""

import torch
from torch import Tensor

from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import AXES, Axis

#: far from the seeds of attention groups and channels
OTHER_AXES = 2**41


@method("random")
def random(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """Random: uniform scores; the control every method must beat.

    The score per cost is uniform in [0, 1), so that attention groups and channels go in equal shares. Each layer and
    axis has a generator of its own: the same seed gives the same numbers whatever else is scored.
    """
    importance: dict[Axis, Tensor] = {}
    for axis in layer.axes:
        number = AXES.index(axis) if axis in AXES else OTHER_AXES
        seed = (options.random_seed * 1_000_003 + layer.layer_idx) * len(AXES) + number
        generator = torch.Generator().manual_seed(seed % 2**63)  # torch takes no larger ones
        uniform = torch.rand(layer.geometry.widths[layer.layer_idx][axis], generator=generator, dtype=torch.float64)
        importance[axis] = uniform * layer.geometry.group_parameters[axis]
    return importance
