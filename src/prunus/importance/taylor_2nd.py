"""Second-order Taylor importance."""

from torch import Tensor

from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import AXES, Axis


@method("taylor_2nd", needs=["gradients", "squares"], axes=AXES)
def taylor_2nd(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """Second-order Taylor: Σ |θ · ḡ| + ½ |θ² · H| over the weights of a group.

    θ is a weight, ḡ = (1/N) Σᵢ gᵢ its mean gradient and H what `options.hessian` puts in place of the diagonal of the
    Hessian: by default (1/N) Σᵢ gᵢ², with gᵢ of the mean loss of sequence i's tokens. With `empirical_fisher` and
    `sampled_fisher` both terms are of the sum over a sequence's tokens, in which the second weighs more by the number
    of tokens.

    Source: Ma et al. 2023, "LLM-Pruner", eq. 6; LeCun et al. 1989, "Optimal Brain Damage", eq. 3.
    """
    return {
        axis: layer.statistics[f"first_order.{axis}"] + 0.5 * layer.statistics[f"second_order.{axis}"]
        for axis in layer.axes
    }
