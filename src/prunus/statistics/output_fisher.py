"""How much the loss minds an error in what a block adds to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunus.model.families import Axis, Projection
from prunus.model.geometry import SPACE_AXIS, Geometry
from prunus.statistics.base import Flow, Statistic

__all__ = ["OutputFisher"]


class OutputFisher(Statistic):
    """Second moment of the gradient by a block's output: the output factor of the Kronecker-factored Fisher matrix.

    With δ_t the gradient of a sequence's summed loss by the output of the block's last projection at token t, a layer
    reports

        output_fisher.<axis>   F = (1/tokens) Σ_t δ_t δ_tᵀ     float32, (hidden_size, hidden_size)

    An error e of the block's output, of a size that does not depend on the token, raises the loss by about ½ eᵀ F e per
    token.

    Args:
        axes: of which blocks.

    Source: Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", eq. 1
    (the factor G).
    """

    def __init__(self, axes: Sequence[Axis] = ("mlp",)):
        self.keys = tuple(f"output_fisher.{axis}" for axis in axes)
        self.axes = tuple(axes)
        self._sums: dict[tuple[int, Axis], Tensor] = {}
        self._tokens: dict[tuple[int, Axis], Tensor] = {}

    def listens_to_output_gradient(self, geometry: Geometry, projection: Projection) -> bool:
        """The projections that write a block's groups back into the residual stream."""
        return projection.inputs in SPACE_AXIS and SPACE_AXIS[projection.inputs] in self.axes

    def on_output_gradient(self, flow: Flow) -> None:
        """Add a batch's outer products."""
        assert flow.gradient is not None
        delta = flow.tokens(flow.gradient).float()
        key = (flow.layer_idx, SPACE_AXIS[flow.projection.inputs])
        if key not in self._sums:
            self._sums[key] = delta.new_zeros(delta.shape[1], delta.shape[1])
            self._tokens[key] = torch.zeros(1, dtype=torch.float64, device=delta.device)
        self._sums[key].addmm_(delta.T, delta)
        self._tokens[key] += len(delta)

    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """Sums of outer products and numbers of tokens."""
        present = [(layer_idx, axis) for axis in self.axes if (layer_idx, axis) in self._sums]
        return [(tensor, "sum") for key in present for tensor in (self._sums[key], self._tokens[key])]

    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Mean over tokens; a block that is not there has none."""
        report = {}
        for axis in self.axes:
            total = self._sums.pop((layer_idx, axis), torch.zeros(0, 0))
            tokens = float(self._tokens.pop((layer_idx, axis), torch.ones(1)))
            report[f"output_fisher.{axis}"] = (total / tokens).cpu()
        return report
