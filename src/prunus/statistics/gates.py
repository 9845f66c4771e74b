"""Gradients by a gate of value 1 on every group: no weight gradient is ever computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunus.families import AXES, Axis, Projection
from prunus.groups import SPACE_AXIS, Geometry
from prunus.statistics.base import Flow, Labels, Statistic

__all__ = ["GateGradients"]


class GateGradients(Statistic):
    """Mean square, over sequences, of the gradient by a gate on each group.

    A gate ξ multiplies a group's slice h of the input of the block's last projection (`o_proj`, `down_proj`); at ξ = 1
    its gradient is ∂Lᵢ/∂ξ = Σ_t h_t · ∂Lᵢ/∂h_t, with Lᵢ summed over the tokens of sequence i. A layer reports

        gate_square.<axis>   (1/N) Σᵢ (∂Lᵢ/∂ξ)²     float64, (groups,)

    Args:
        labels: whether the loss is of the text or of tokens drawn from the model's predictions.

    Source: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", eq. 5 (diagonal empirical
    Fisher of masks).
    """

    keys = tuple(f"gate_square.{axis}" for axis in AXES)

    def __init__(self, labels: Labels = "text") -> None:
        self.labels = labels
        self._squares: dict[tuple[int, Axis], Tensor] = {}

    def listens_to_input_gradient(self, geometry: Geometry, projection: Projection) -> bool:
        """The projections that write a block's groups back into the residual stream."""
        return projection.inputs in SPACE_AXIS

    def on_input_gradient(self, flow: Flow) -> None:
        """Add a batch's squared gate gradients."""
        assert flow.input_gradient is not None
        axis = SPACE_AXIS[flow.projection.inputs]
        # float32 products: in bf16 the sum over hundreds of tokens would lose its small terms.
        columns = (flow.x.float() * flow.input_gradient.float()).sum(dim=1)
        gates = columns.double().reshape(len(columns), flow.geometry.widths[flow.layer_idx][axis], -1).sum(dim=2)
        squares = gates.square().sum(dim=0)
        key = (flow.layer_idx, axis)
        self._squares[key] = self._squares[key] + squares if key in self._squares else squares

    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """Sums of squares of both axes."""
        return [(self._squares[layer_idx, axis], "sum") for axis in AXES if (layer_idx, axis) in self._squares]

    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Mean over sequences; a block that is not there has no groups."""
        empty = torch.zeros(0, dtype=torch.float64)
        return {f"gate_square.{axis}": self._squares.pop((layer_idx, axis), empty).cpu() / sequences for axis in AXES}
