"""Closed-form repair of experts: those that stay learn to add, together, what all of them did.

For a token t the block of experts of a cut layer answers Σ_e w_te W_e h_te (and what shared experts add), with h_te
what enters the last projection W_e of expert e and w_te the router's weight. Its error against the target of
`prunus.repair.block_repair` is ρ_t. Each expert that t goes to takes the part of it that the router gives to that
expert:

    T_te = w_te W_e h_te + w_te / (Σ_e' w_te') ρ_t

If every expert met its T_te, the error would be gone. Each W_e is solved from its own tokens, X = w_te h_te, as a
projection of a dense block is solved; an expert with few tokens stays near its old weights, towards which the ridge
pulls.

Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.2, for least squares on
the pruned network's own inputs.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunus.model.experts import expert_hidden, expert_weights, tokens_of_experts
from prunus.repair.block_walk import Routed
from prunus.repair.least_squares import TokenSums, solve_ridge_

__all__ = ["EXPERT_REPAIRS", "ExpertRepair", "ExpertSums"]

logger = logging.getLogger(__name__)

ExpertRepair = Literal["least_squares", "none"]
EXPERT_REPAIRS: tuple[ExpertRepair, ...] = get_args(ExpertRepair)


class ExpertSums:
    """What the experts of one layer are solved from, as batches come.

    Args:
        experts: the module of the routed experts, whose weights are changed at the end.
        saved: dtype that the model will be saved in; the weights are rounded to it.

    Attributes:
        tokens: how many tokens each expert got so far, int64, (experts,).
    """

    def __init__(self, experts: Any, saved: torch.dtype):
        self._experts, self._saved = experts, saved
        self._sums: dict[int, TokenSums] = {}
        self.tokens = torch.zeros(len(experts.down_proj), dtype=torch.int64)

    def add(self, seen: Routed, target: Tensor, mask: Tensor | None, source: int = 0) -> None:
        """Add a batch of a source; those of one source come one after the other.

        Args:
            seen: the experts at work on it.
            target: what they should add, float32, (batch, seq_len, hidden_size).
            mask: bool, (batch, seq_len): true for tokens that are not padding; None = all.
            source: number of the source.
        """
        error = (target - seen.output.float()).flatten(0, 1)
        counted = slice(None) if mask is None else mask.flatten().to(error.device)
        x, chosen, weights, error = seen.x[counted], seen.chosen[counted], seen.weights[counted].float(), error[counted]
        self.tokens += torch.bincount(chosen.flatten(), minlength=len(self.tokens)).cpu()
        parts = weights / weights.sum(dim=1, keepdim=True)
        for expert, tokens, places in tokens_of_experts(chosen):
            own = expert_weights(self._experts, expert)
            inputs = expert_hidden(self._experts, own, x[tokens]).float() * weights[tokens, places, None]
            last = self._last(expert).float()
            if expert not in self._sums:
                self._sums[expert] = TokenSums(last.shape[1], last.shape[0], last.device)
            self._sums[expert].add(inputs, inputs @ last.T + parts[tokens, places, None] * error[tokens], source)

    @torch.no_grad()
    def solve_(self, damping: float) -> tuple[float, float, float]:
        """Change the experts.

        Args:
            damping: ridge towards the old weights, as a share of the mean diagonal of the normal equations.

        Returns:
            The relative squared error, of all experts against their own targets, before and after, and the largest
            condition number.
        """
        before = after = total = condition = 0.0
        for expert, sums in sorted(self._sums.items()):
            equations, last = sums.equations(), self._last(expert)
            error = left = equations.error(last)
            try:
                solution = solve_ridge_(equations, last, damping)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                logger.warning("an expert is kept as it is: its normal equations cannot be solved")
            else:
                condition = max(condition, solution.condition)
                if solution.error < error:
                    left = solution.error
                    last.copy_(solution.weight.to(self._saved))
            before += error * equations.target_square
            after += left * equations.target_square
            total += equations.target_square
        self._sums.clear()
        total = max(total, torch.finfo(torch.float64).tiny)
        return before / total, after / total, condition

    def _last(self, expert: int) -> Tensor:
        """The last projection of an expert as a linear module has it, (hidden_size, intermediate): a view."""
        weight: Tensor = self._experts.down_proj.detach()[expert]
        return weight.T if self._experts.is_transposed else weight
