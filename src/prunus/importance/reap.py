"""What an expert adds, weighed by the router."""

from torch import Tensor

from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import Axis


@method("reap", needs=["routing"], comparable=False, axes=("expert",))
def reap(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """REAP: mean of w · ‖f(x)‖₂ over the tokens of an expert; experts only, forward passes only.

    w is the router's weight of the expert for a token x that it is chosen for, f(x) the expert's output. An expert
    without tokens is worth 0.

    Source: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999
    (the saliency S_j).
    """
    return {"expert": layer.statistics["routing.contribution"] / layer.statistics["routing.tokens"].clamp(min=1)}
