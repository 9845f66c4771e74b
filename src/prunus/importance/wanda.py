"""Weights times activations."""

from torch import Tensor

from prunus.errors import StatisticsError
from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import AXES, Axis
from prunus.statistics.activations import read_activations


@method("wanda", needs=["activations"], comparable=False, axes=AXES)
def wanda(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """Wanda: Σ |θ · A| over the weights of a group; forward passes only.

    A is what enters the weight's column, averaged over all calibration tokens (`options.activation`, by default the
    mean of |x|). Biases have no input and count |θ|. Raw scores of different layers are not on one scale: a layer with
    large activations looks important throughout. Normalise over layers (`layer_sum`) before a global ranking.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1, summed to
    groups.
    """
    importance: dict[Axis, Tensor] = {}
    for axis in layer.axes:
        values = {}
        for name, weight in layer.projection_weights(axis):
            projection = name.split(".")[-2]
            if weight.ndim == 1:
                values[name] = weight.float().abs()
            else:
                activation = read_activations(layer.statistics, projection, options.activation)
                if activation.shape != weight.shape[1:]:
                    raise StatisticsError(
                        f"layer {layer.layer_idx}: the statistics are of another model: {len(activation)} inputs of "
                        f"{projection}, which has {weight.shape[1]}"
                    )
                values[name] = (weight.float() * activation.to(weight.device).float()).abs()
        importance[axis] = layer.sum_to_groups(axis, values)
    return importance
