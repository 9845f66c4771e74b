"""Weights alone."""

from torch import Tensor

from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import Axis


@method("magnitude", comparable=False)
def magnitude(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """Magnitude: Σ |θ| over the weights of a group; a control that needs no calibration.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.1.
    """
    return {
        axis: layer.sum_to_groups(axis, {name: w.float().abs() for name, w in layer.projection_weights(axis)})
        for axis in layer.axes
    }
