"""Weight gradients, reduced to groups: what first- and second-order Taylor importance is made of."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunus.errors import OptionError
from prunus.model.dimensions import SPACE_AXIS
from prunus.model.experts import expert_output, expert_weights, tokens_of_experts
from prunus.model.families import AXES, Axis, Block, Projection
from prunus.model.geometry import Geometry
from prunus.model.modules import submodule
from prunus.statistics.base import ExpertsCall, Labels, Moment, ProjectionCall, Statistic

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

    def listens(self, moment: Moment, geometry: Geometry, part: Projection | Block) -> bool:
        """All projections, since every weight of theirs belongs to a group; experts where the first order is taken."""
        return moment == "output_gradient" or (moment in ("expert_gradient", "router_gradient") and self.means)

    def on_expert_gradient(self, call: ExpertsCall) -> None:
        """Add a batch's gradients of the weights of its experts."""
        assert call.gradient is not None
        delta = call.gradient.float() * self._scales(call)[:, None]
        for expert, tokens, places in tokens_of_experts(call.chosen):
            weights = {name: w.requires_grad_() for name, w in expert_weights(call.module, expert).items()}
            with torch.enable_grad():
                output = expert_output(call.module, weights, call.x[tokens])
            by_output = (delta[tokens] * call.weights[tokens, places, None].float()).to(output.dtype)
            for name, gradient in zip(
                weights, torch.autograd.grad(output, list(weights.values()), by_output), strict=True
            ):
                path = f"{call.block.experts}.{name}"
                self._sums_of(call.layer_idx, path, (call.experts, *gradient.shape), gradient.device)[expert] += (
                    gradient
                )

    def on_router_gradient(self, call: ExpertsCall) -> None:
        """Add a batch's gradients of the router's rows."""
        assert call.gradient is not None
        delta, here = call.gradient.float() * self._scales(call)[:, None], call.x.device
        rows = f"{call.block.router}.weight"
        self._sums_of(call.layer_idx, rows, (call.experts, call.x.shape[1]), here).addmm_(delta.T, call.x.float())
        if (biases := f"{call.block.router}.bias") in {stack.path for stack in call.block.stacks}:
            self._sums_of(call.layer_idx, biases, (call.experts,), here).add_(delta.sum(dim=0))

    def _scales(self, call: ExpertsCall) -> Tensor:
        """What the loss of each token counts, (batch · seq_len,)."""
        each = call.targets.clamp(min=1).reciprocal() if self.loss_scale == "mean" else torch.ones_like(call.targets)
        return each[call.sequences]

    def _sums_of(self, layer_idx: int, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        sums = self._gradients.setdefault(layer_idx, {})
        if name not in sums:
            sums[name] = torch.zeros(shape, dtype=torch.float32, device=device)
        return sums[name]

    def on_output_gradient(self, call: ProjectionCall) -> None:
        """Add a batch's gradients of one projection's weight and bias."""
        delta, x = call.gradient, call.x
        assert delta is not None
        if self.squares:
            for sequence in range(len(x)):
                self._add(call, delta[sequence], x[sequence], float(call.targets[sequence]))
            return
        if self.loss_scale == "mean":
            targets = call.targets
            if bool((targets == targets[0]).all()):
                self._add(call, delta.flatten(0, 1), x.flatten(0, 1), float(targets[0]))
                return
            delta = delta / targets.to(delta.dtype).clamp(min=1)[:, None, None]
        self._add(call, delta.flatten(0, 1), x.flatten(0, 1), 1.0)

    def _add(self, call: ProjectionCall, delta: Tensor, x: Tensor, targets: float) -> None:
        """Add the gradient δᵀx of one or more sequences that have `targets` tokens each."""
        scale = 1.0 / max(targets, 1.0) if self.loss_scale == "mean" else 1.0
        self._add_parameter(call, "weight", delta.T @ x, scale)
        if call.module.bias is not None:
            self._add_parameter(call, "bias", delta.sum(dim=0, dtype=torch.float32), scale)

    def _add_parameter(self, call: ProjectionCall, parameter: str, gradient: Tensor, scale: float) -> None:
        if self.squares:
            # One float32 copy serves both orders; it is the passes over it that cost, not the arithmetic.
            gradient = gradient.float()
        if self.means:
            name = f"{call.projection.path}.{parameter}"
            self._sums_of(call.layer_idx, name, tuple(gradient.shape), gradient.device).add_(gradient, alpha=scale)
        if self.squares:
            product = gradient.mul_(call.module.get_parameter(parameter).detach())
            axis = _axis(call.projection)
            reduced = scale**2 * call.geometry.sum_projection_to_groups(
                call.layer_idx, axis, call.projection, product, squared=True
            )
            squares = self._squares.setdefault(call.layer_idx, {})
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
