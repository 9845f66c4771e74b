"""What the loss says of a gate of value 1 on every group: no weight gradient is ever computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.model.dimensions import SPACE_AXIS
from prunus.model.families import AXES, Axis, Block, Projection
from prunus.model.geometry import Geometry
from prunus.statistics.base import ExpertsCall, Labels, Moment, ProjectionCall, Statistic

__all__ = ["GateGradients"]

#: up to so many channels, which may each be much of a block, x − x_g is written out: squares would cancel
FEW = 16


class GateGradients(Statistic):
    """Mean square, over sequences, of what closing a gate on each group does to the loss, to first order.

    A gate ξ multiplies a group's slice h of the input of the block's last projection (`o_proj`, `down_proj`); at ξ = 1
    its gradient is ∂Lᵢ/∂ξ = Σ_t h_t · ∂Lᵢ/∂h_t, with Lᵢ summed over the tokens of sequence i. A layer reports

        gate_square.<axis>   (1/N) Σᵢ (∂Lᵢ/∂ξ)²     float64, (groups,)

    The gate of an expert stands on what it adds to each of its tokens, w · f(x) with w the router's weight: there
    h · ∂Lᵢ/∂h = w ∂Lᵢ/∂w, so that no expert runs again.

    Where a norm stands between the block and the residual stream (Gemma, OLMo 2), it makes up for any common factor:
    the gates' gradients of a block sum to zero, and that of a group which is the whole block says nothing, although
    nothing is left without it. There the effect of the closed gate goes through the norm as it is, and only what
    follows is linear. With δ the gradient behind the norm, s its weights, x the output of the projection, x_g the
    group's part of it and D its width:

        ∂Lᵢ/∂ξ → Σ_t [A / r(x) − (A − a_g) / r(x − x_g)],    a_g = (s δ)·x_g,  A = (s δ)·x,  r(x) = √(‖x‖² / D + ε)

    which is nearly the gradient for a group that is a small part of x. A group that is all of the block leaves nothing:
    A / r. Groups that go together (`Block.indivisible`) get equal shares of its square.

    Args:
        labels: whether the loss is of the text or of tokens drawn from the model's predictions.

    Source: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", eq. 5 (diagonal empirical
    Fisher of masks).
    """

    keys = tuple(f"gate_square.{axis}" for axis in AXES)

    def __init__(self, labels: Labels = "text") -> None:
        self.labels = labels
        self._squares: dict[tuple[int, Axis], Tensor] = {}

    def listens(self, moment: Moment, geometry: Geometry, part: Projection | Block) -> bool:
        """The projections that write a block's groups back into the stream: at their input, or behind a norm there."""
        if moment == "input_gradient" and isinstance(part, Projection):
            axis = SPACE_AXIS.get(part.inputs)
            return axis is not None and geometry.family.block(axis).post_norm is None
        return moment in ("stream_gradient", "routing_gradient")

    def on_routing_gradient(self, call: ExpertsCall) -> None:
        """Add a batch's squared gate gradients of experts."""
        assert call.gradient is not None
        shares = call.weights.double() * call.gradient.double()
        gates = shares.new_zeros(len(call.targets), call.experts)
        rows = call.sequences[:, None].expand_as(call.chosen)
        gates.index_put_((rows, call.chosen), shares, accumulate=True)
        self._add(call.layer_idx, "expert", gates)

    def on_input_gradient(self, call: ProjectionCall) -> None:
        """Add a batch's squared gate gradients."""
        assert call.gradient is not None
        axis = SPACE_AXIS[call.projection.inputs]
        # float32 products: in bf16 the sum over hundreds of tokens would lose its small terms.
        columns = (call.x.float() * call.gradient.float()).sum(dim=1)
        gates = columns.double().reshape(len(columns), call.geometry.widths[call.layer_idx][axis], -1).sum(dim=2)
        self._add(call.layer_idx, axis, gates)

    def on_stream_gradient(self, call: ProjectionCall) -> None:
        """Add a batch's squared effects through the norm."""
        axis = SPACE_AXIS[call.projection.inputs]
        groups = call.geometry.widths[call.layer_idx][axis]
        together = groups == 1 or call.geometry.family.block(axis).indivisible
        effects = _effects_through_norm(call, groups, together)
        self._add(call.layer_idx, axis, effects.double().sum(dim=1))

    def _add(self, layer_idx: int, axis: Axis, gates: Tensor) -> None:
        """Add the squares of the gates of some sequences, (sequences, groups)."""
        squares = gates.square().sum(dim=0)
        key = (layer_idx, axis)
        self._squares[key] = self._squares[key] + squares if key in self._squares else squares

    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """Sums of squares of all axes."""
        return [(self._squares[key], "sum") for key in sorted(self._squares) if key[0] == layer_idx]

    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Mean over sequences; a block that is not there has no groups."""
        empty = torch.zeros(0, dtype=torch.float64)
        return {
            f"gate_square.{axis}": self._squares.pop((layer_idx, axis), empty).cpu() / sequences
            for axis in geometry.axes
        }


def _effects_through_norm(call: ProjectionCall, groups: int, together: bool) -> Tensor:
    """A / r(x) − (A − a_g) / r(x − x_g) of every token and group, see `GateGradients`.

    Args:
        call: with the norm and the gradient behind it.
        groups: number of groups of the block.
        together: the groups go together, and the block with them.

    Returns:
        float32, (batch, seq_len, groups).
    """
    assert call.norm is not None
    assert call.gradient is not None
    norm: Any = call.norm
    inputs, weight = call.x.float(), call.module.weight.float()
    bias = 0.0 if call.module.bias is None else call.module.bias.float()
    pull = call.gradient.float() * (call.geometry.family.norm_offset + norm.weight.float())
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    output = inputs @ weight.T + bias

    def rms(square: Tensor) -> Tensor:
        return (square.clamp(min=0) / output.shape[-1] + epsilon).sqrt()

    total, square = (pull * output).sum(dim=-1, keepdim=True), output.square().sum(dim=-1, keepdim=True)
    if together:
        return (total / rms(square) / groups**0.5).expand(-1, -1, groups)
    if groups <= FEW or groups < weight.shape[1]:
        each = zip(inputs.chunk(groups, dim=-1), weight.chunk(groups, dim=1), strict=True)
        rests = (output - x @ w.T for x, w in each)
        after = [(pull * rest).sum(dim=-1) / rms(rest.square().sum(dim=-1)) for rest in rests]
        return total / rms(square) - torch.stack(after, dim=-1)

    def along(direction: Tensor) -> Tensor:
        """Products of a direction and every x_g, (batch, seq_len, groups)."""
        return (inputs * (direction @ weight)).unflatten(-1, (groups, -1)).sum(dim=-1)

    own = inputs.square() * weight.square().sum(dim=0)
    return total / rms(square) - (total - along(pull)) / rms(square - 2 * along(output) + own)
