"""Fisher information of a gate on each group."""

from torch import Tensor

from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import Axis


@method("gate_fisher", needs=["gates"])
def gate_fisher(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """Gate Fisher: (1/N) Σᵢ (∂Lᵢ/∂ξ)², ξ a gate of value 1 on the group; no weight gradients.

    Lᵢ is the loss of calibration sequence i, summed over its tokens; with `options.hessian` sampled_fisher, over tokens
    drawn from the model's predictions. To second order, with the diagonal of the Fisher matrix in place of the Hessian,
    half of it is how far the loss rises when the gate closes.

    Source: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", eqs. 5-7.
    """
    return {axis: layer.statistics[f"gate_square.{axis}"] for axis in layer.axes}
