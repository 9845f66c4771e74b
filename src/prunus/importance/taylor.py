"""First-order Taylor importance."""

from torch import Tensor

from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import Axis


@method("taylor", needs=["gradients"])
def taylor(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """First-order Taylor: Σ |θ · ḡ| over the weights of a group.

    θ is a weight and ḡ = (1/N) Σᵢ gᵢ its mean gradient over the N calibration sequences: to first order, how far the
    loss moves when the weight is set to zero.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8 (without the square);
    Ma et al. 2023, "LLM-Pruner", eq. 5.
    """
    return {axis: layer.statistics[f"first_order.{axis}"] for axis in layer.axes}
