"""How many tokens go to an expert."""

from torch import Tensor

from prunus.importance.registry import LayerEvidence, MethodOptions, method
from prunus.model.families import Axis


@method("frequency", needs=["routing"], comparable=False, axes=("expert",))
def frequency(layer: LayerEvidence, options: MethodOptions) -> dict[Axis, Tensor]:
    """Frequency: share of a layer's routed tokens that go to an expert; experts only, forward passes only.

    Source: Li et al. 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy"
    (activation frequency).
    """
    tokens = layer.statistics["routing.tokens"]
    return {"expert": tokens / tokens.sum().clamp(min=1)}
