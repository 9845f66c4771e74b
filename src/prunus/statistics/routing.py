"""Where the router sends tokens, and what the experts add: forward passes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunus.model.geometry import Geometry
from prunus.statistics.base import Routing, Statistic

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

    def listens_to_routing(self) -> bool:
        """In every layer with experts."""
        return True

    def listens_to_expert_outputs(self) -> bool:
        """Where they are wanted."""
        return self.outputs

    def on_routing(self, flow: Routing) -> None:
        """Count a batch's tokens."""
        chosen, weights = flow.tokens(flow.chosen), flow.tokens(flow.weights).double()
        sums = self._of(flow)
        sums["tokens"] += torch.bincount(chosen.flatten(), minlength=flow.experts).double()
        sums["weight"].index_add_(0, chosen.flatten(), weights.flatten())

    def on_expert_output(self, flow: Routing, expert: int, tokens: Tensor, places: Tensor, output: Tensor) -> None:
        """Add what an expert contributes to a batch."""
        norms = torch.linalg.vector_norm(output.detach().float(), dim=-1).double()
        contributions = flow.weights[tokens, places].double() * norms
        if flow.mask is not None:
            contributions = contributions[flow.mask.flatten()[tokens]]
        self._of(flow)["contribution"][expert] += contributions.sum()

    def _of(self, flow: Routing) -> dict[str, Tensor]:
        if flow.layer_idx not in self._sums:
            empty = torch.zeros(flow.experts, dtype=torch.float64, device=flow.x.device)
            self._sums[flow.layer_idx] = {name.partition(".")[2]: empty.clone() for name in self.keys}
        return self._sums[flow.layer_idx]

    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """All sums of a layer."""
        return [(tensor, "sum") for tensor in self._sums.get(layer_idx, {}).values()]

    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Report the sums; a layer without experts has none."""
        sums, empty = self._sums.pop(layer_idx, {}), torch.zeros(0, dtype=torch.float64)
        return {key: sums.get(key.partition(".")[2], empty).cpu() for key in self.keys}
