"""Weight gradients, reduced to groups: what first- and second-order Taylor importance is made of."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunus.errors import OptionError
from prunus.model.experts import expert_output, expert_weights, tokens_of_experts
from prunus.model.families import AXES, Axis, Projection
from prunus.model.geometry import SPACE_AXIS, Geometry, submodule
from prunus.statistics.base import Flow, Labels, Routing, Statistic

__all__ = ["LossScale", "WeightGradients"]

LossScale = Literal["mean", "sum"]


class WeightGradients(Statistic):
    """Mean gradient over all sequences, and mean squared gradient of each single sequence.

    With gᵢ the gradient of the loss of sequence i by a weight θ, a layer reports per axis, summed over the weights of
    each group (float64, (groups,)):

        first_order.<axis>   Σ |θ · ḡ|,    ḡ = (1/N) Σᵢ gᵢ
        second_order.<axis>  Σ |θ² · H|,   H = (1/N) Σᵢ gᵢ²

    The gradient of a linear module is gᵢ = δᵢᵀ xᵢ, from its input and the gradient by its output, so each sequence's
    own gradient costs the same products as the batch's sum. ḡ must be kept whole until the end, since |θ · ḡ| does
    not commute with the sum over sequences; (θ gᵢ)² does, and is reduced to groups at once. All in float32 or wider.
    Of experts only the first order is taken: each runs again for its tokens, from the gradient by what all add up to.

    Args:
        means: take the first order.
        squares: take the second order.
        loss_scale: `mean` for the loss of a sequence as the mean over its tokens, `sum` for the sum.
        labels: whether the loss is of the text or of tokens drawn from the model's predictions.
    """

    def __init__(
        self, means: bool = True, squares: bool = False, loss_scale: LossScale = "mean", labels: Labels = "text"
    ):
        if loss_scale not in get_args(LossScale):
            raise OptionError(f"loss scale {loss_scale!r} is unknown; choose mean or sum")
        if not (means or squares):
            raise OptionError("weight gradients without means and squares are nothing to take")
        self.means = means
        self.squares = squares
        self.loss_scale = loss_scale
        self.labels = labels
        orders = [order for order, wanted in (("first_order", means), ("second_order", squares)) if wanted]
        self.keys = tuple(f"{order}.{axis}" for order in orders for axis in AXES)
        self._gradients: dict[int, dict[str, Tensor]] = {}
        self._squares: dict[int, dict[Axis, Tensor]] = {}

    def listens_to_output_gradient(self, geometry: Geometry, projection: Projection) -> bool:
        """All projections: every weight of a decoder layer's projections belongs to a group."""
        return True

    def listens_to_expert_gradient(self) -> bool:
        """Where the first order is taken."""
        return self.means

    def on_expert_gradient(self, flow: Routing) -> None:
        """Add a batch's gradients of the weights of its experts."""
        assert flow.gradient is not None
        delta = flow.gradient.float() * self._scales(flow)[:, None]
        for expert, tokens, places in tokens_of_experts(flow.chosen):
            weights = {name: w.requires_grad_() for name, w in expert_weights(flow.module, expert).items()}
            with torch.enable_grad():
                output = expert_output(flow.module, weights, flow.x[tokens])
            by_output = (delta[tokens] * flow.weights[tokens, places, None].float()).to(output.dtype)
            for name, gradient in zip(
                weights, torch.autograd.grad(output, list(weights.values()), by_output), strict=True
            ):
                path = f"{flow.block.experts}.{name}"
                self._sums_of(flow.layer_idx, path, (flow.experts, *gradient.shape), gradient.device)[expert] += (
                    gradient
                )

    def on_router_gradient(self, flow: Routing) -> None:
        """Add a batch's gradients of the router's rows."""
        assert flow.gradient is not None
        delta, here = flow.gradient.float() * self._scales(flow)[:, None], flow.x.device
        rows = f"{flow.block.router}.weight"
        self._sums_of(flow.layer_idx, rows, (flow.experts, flow.x.shape[1]), here).addmm_(delta.T, flow.x.float())
        if (biases := f"{flow.block.router}.bias") in {stack.path for stack in flow.block.stacks}:
            self._sums_of(flow.layer_idx, biases, (flow.experts,), here).add_(delta.sum(dim=0))

    def _scales(self, flow: Routing) -> Tensor:
        """What the loss of each token counts, (batch · seq_len,)."""
        each = flow.targets.clamp(min=1).reciprocal() if self.loss_scale == "mean" else torch.ones_like(flow.targets)
        return each[flow.sequences]

    def _sums_of(self, layer_idx: int, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        sums = self._gradients.setdefault(layer_idx, {})
        if name not in sums:
            sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)
        return sums[name]

    def on_output_gradient(self, flow: Flow) -> None:
        """Add a batch's gradients of one projection's weight and bias."""
        delta, x = flow.gradient, flow.x
        assert delta is not None
        if self.squares:
            for sequence in range(len(x)):
                self._add(flow, delta[sequence], x[sequence], float(flow.targets[sequence]))
            return
        if self.loss_scale == "mean":
            targets = flow.targets
            if bool((targets == targets[0]).all()):
                self._add(flow, delta.flatten(0, 1), x.flatten(0, 1), float(targets[0]))
                return
            delta = delta / targets.to(delta.dtype).clamp(min=1)[:, None, None]
        self._add(flow, delta.flatten(0, 1), x.flatten(0, 1), 1.0)

    def _add(self, flow: Flow, delta: Tensor, x: Tensor, targets: float) -> None:
        """Add the gradient δᵀx of one or more sequences that have `targets` tokens each."""
        scale = 1.0 / max(targets, 1.0) if self.loss_scale == "mean" else 1.0
        self._add_parameter(flow, "weight", delta.T @ x, scale)
        if flow.module.bias is not None:
            self._add_parameter(flow, "bias", delta.sum(dim=0, dtype=torch.float32), scale)

    def _add_parameter(self, flow: Flow, parameter: str, gradient: Tensor, scale: float) -> None:
        if self.squares:
            # One float32 copy serves both orders; it is the passes over it that cost, not the arithmetic.
            gradient = gradient.float()
        if self.means:
            name = f"{flow.projection.path}.{parameter}"
            self._sums_of(flow.layer_idx, name, tuple(gradient.shape), gradient.device).add_(gradient, alpha=scale)
        if self.squares:
            product = gradient.mul_(flow.module.get_parameter(parameter).detach())
            axis = _axis(flow.projection)
            reduced = scale**2 * flow.geometry.sum_projection_to_groups(
                flow.layer_idx, axis, flow.projection, product, squared=True
            )
            squares = self._squares.setdefault(flow.layer_idx, {})
            squares[axis] = squares[axis] + reduced if axis in squares else reduced

    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """Sums of gradients by parameter, and of squares by axis."""
        sums = [*sorted(self._gradients.get(layer_idx, {}).items()), *sorted(self._squares.get(layer_idx, {}).items())]
        return [(tensor, "sum") for _, tensor in sums]

    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Reduce ḡ of a layer to |θ · ḡ| per group, and free it."""
        report: dict[str, Tensor] = {}
        if self.means:
            first = {}
            for name, gradient in self._gradients.pop(layer_idx, {}).items():
                path, _, parameter = name.rpartition(".")
                weight = submodule(layer, path).get_parameter(parameter).detach()
                first[name] = gradient.mul_(weight).abs_().div_(sequences)
            report |= {f"first_order.{axis}": geometry.sum_to_groups(layer_idx, axis, first) for axis in geometry.axes}
        if self.squares:
            squares = self._squares.pop(layer_idx, {})
            empty = torch.zeros(0, dtype=torch.float64)
            report |= {f"second_order.{axis}": squares.get(axis, empty).cpu() / sequences for axis in AXES}
        return report


def _axis(projection: Projection) -> Axis:
    """The axis whose groups a projection's weights belong to."""
    return SPACE_AXIS[projection.inputs if projection.inputs in SPACE_AXIS else projection.outputs[0]]
