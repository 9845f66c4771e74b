"""Where the router sends tokens, and what the experts add: forward passes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunus.model.families import Block, Projection
from prunus.model.geometry import Geometry
from prunus.statistics.base import ExpertsCall, Moment, Statistic

__all__ = ["RoutingStatistics"]


class RoutingStatistics(Statistic):
    """Sums over the tokens that are sent to each expert; padding never counts.

    A layer reports, float64, (experts,), with w the router's weight of an expert for a token and f the expert's output:

        routing.tokens         number of tokens
        routing.weight         Σ_t w_t
        routing.contribution   Σ_t w_t ‖f(x_t)‖₂; only with `outputs`

    Args:
        outputs: take the outputs of the experts, too.
    """

    def __init__(self, outputs: bool = False) -> None:
        self.outputs = outputs
        names = ("tokens", "weight", "contribution") if outputs else ("tokens", "weight")
        self.keys = tuple(f"routing.{name}" for name in names)
        self._sums: dict[int, dict[str, Tensor]] = {}

    def listens(self, moment: Moment, geometry: Geometry, part: Projection | Block) -> bool:
        """Where tokens are sent to, and what experts make of them where that is wanted."""
        return moment == "routing" or (moment == "expert_output" and self.outputs)

    def on_routing(self, call: ExpertsCall) -> None:
        """Count a batch's tokens."""
        chosen, weights = call.tokens(call.chosen), call.tokens(call.weights).double()
        sums = self._of(call)
        sums["tokens"] += torch.bincount(chosen.flatten(), minlength=call.experts).double()
        sums["weight"].index_add_(0, chosen.flatten(), weights.flatten())

    def on_expert_output(self, call: ExpertsCall, expert: int, tokens: Tensor, places: Tensor, output: Tensor) -> None:
        """Add what an expert contributes to a batch."""
        norms = torch.linalg.vector_norm(output.detach().float(), dim=-1).double()
        contributions = call.weights[tokens, places].double() * norms
        if call.mask is not None:
            contributions = contributions[call.mask.flatten()[tokens]]
        self._of(call)["contribution"][expert] += contributions.sum()

    def _of(self, call: ExpertsCall) -> dict[str, Tensor]:
        if call.layer_idx not in self._sums:
            empty = torch.zeros(call.experts, dtype=torch.float64, device=call.x.device)
            self._sums[call.layer_idx] = {name.partition(".")[2]: empty.clone() for name in self.keys}
        return self._sums[call.layer_idx]

    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """All sums of a layer."""
        return [(tensor, "sum") for tensor in self._sums.get(layer_idx, {}).values()]

    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Report the sums; a layer without experts has none."""
        sums, empty = self._sums.pop(layer_idx, {}), torch.zeros(0, dtype=torch.float64)
        return {key: sums.get(key.partition(".")[2], empty).cpu() for key in self.keys}
