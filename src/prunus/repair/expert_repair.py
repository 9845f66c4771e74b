"""Closed-form repair of experts: those that stay learn to add, together, what all of them did.

For a token t the block of experts of a cut layer answers Σ_e w_te W_e h_te (and what shared experts add), with h_te
what enters the last projection W_e of expert e and w_te the router's weight. Its error against the target of
`prunus.repair.block_repair` is ρ_t. Each expert that t goes to takes the part of it that the router gives to that
expert:

    T_te = w_te W_e h_te + w_te / (Σ_e' w_te') ρ_t

If every expert met its T_te, the error would be gone. `least_squares` solves each W_e from its own tokens, X = w_te
h_te, as a projection of a dense block is solved; an expert with few tokens stays near its old weights, towards which
the ridge pulls. `gain` finds one factor per expert, g = 1 + δ, for all experts of the layer together:

    δ = argmin Σ_t ‖ρ_t − Σ_e δ_e w_te W_e h_te‖² + λ ‖δ‖²

Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.2, for least squares on
the pruned network's own inputs.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunus.model.experts import expert_hidden, expert_output, expert_weights, tokens_of_experts
from prunus.repair.block_walk import Routed
from prunus.repair.least_squares import TokenSums, solve_ridge_

__all__ = ["EXPERT_REPAIRS", "ExpertRepair", "ExpertSums"]

logger = logging.getLogger(__name__)

ExpertRepair = Literal["least_squares", "gain", "none"]
EXPERT_REPAIRS: tuple[ExpertRepair, ...] = get_args(ExpertRepair)


class ExpertSums:
    """What the experts of one layer are solved from, as batches come.

    Args:
        experts: the module of the routed experts, whose weights are changed at the end.
        way: how.
        saved: dtype that the model will be saved in; the weights are rounded to it.

    Attributes:
        tokens: how many tokens each expert got so far, int64, (experts,).
    """

    def __init__(self, experts: Any, way: ExpertRepair, saved: torch.dtype):
        self._experts, self._way, self._saved = experts, way, saved
        self._sums: dict[int, TokenSums] = {}
        self.tokens = torch.zeros(len(experts.down_proj), dtype=torch.int64)
        number, device = len(experts.down_proj), experts.down_proj.device
        self._gram = torch.zeros(number, number, dtype=torch.float64, device=device)
        self._cross = torch.zeros(number, dtype=torch.float64, device=device)
        self._error_square = self._target_square = 0.0

    def add(self, seen: Routed, target: Tensor, mask: Tensor | None) -> None:
        """Add a batch.

        Args:
            seen: the experts at work on it.
            target: what they should add, float32, (batch, seq_len, hidden_size).
            mask: bool, (batch, seq_len): true for tokens that are not padding; None = all.
        """
        error = (target - seen.output.float()).flatten(0, 1)
        counted = slice(None) if mask is None else mask.flatten().to(error.device)
        x, chosen, weights, error = seen.x[counted], seen.chosen[counted], seen.weights[counted].float(), error[counted]
        self._error_square += float(error.double().square().sum())
        self._target_square += float(target.flatten(0, 1)[counted].double().square().sum())
        self.tokens += torch.bincount(chosen.flatten(), minlength=len(self.tokens)).cpu()
        if self._way == "gain":
            self._add_contributions(x, chosen, weights, error)
            return
        parts = weights / weights.sum(dim=1, keepdim=True)
        for expert, tokens, places in tokens_of_experts(chosen):
            own = expert_weights(self._experts, expert)
            inputs = expert_hidden(self._experts, own, x[tokens]).float() * weights[tokens, places, None]
            last = self._last(expert).float()
            if expert not in self._sums:
                self._sums[expert] = TokenSums(last.shape[1], last.shape[0], last.device)
            self._sums[expert].add(inputs, inputs @ last.T + parts[tokens, places, None] * error[tokens])

    def _add_contributions(self, x: Tensor, chosen: Tensor, weights: Tensor, error: Tensor) -> None:
        added = torch.zeros(*chosen.shape, error.shape[1], dtype=torch.float32, device=error.device)
        for expert, tokens, places in tokens_of_experts(chosen):
            output = expert_output(self._experts, expert_weights(self._experts, expert), x[tokens])
            added[tokens, places] = output.float() * weights[tokens, places, None]
        products = (added @ added.transpose(1, 2)).double()
        rows, columns = chosen[:, :, None].expand_as(products), chosen[:, None, :].expand_as(products)
        self._gram.index_put_((rows, columns), products, accumulate=True)
        along_error = (added * error[:, None]).sum(dim=2).double()
        self._cross.index_put_((chosen,), along_error, accumulate=True)

    @torch.no_grad()
    def solve_(self, damping: float) -> tuple[float, float, float]:
        """Change the experts.

        Args:
            damping: ridge towards the old weights, as a share of the mean diagonal of the normal equations.

        Returns:
            The relative squared error before and after, and the largest condition number. Of `gain` the error is the
            block's, of `least_squares` that of all experts against their own targets.
        """
        return self._solve_gains_(damping) if self._way == "gain" else self._solve_each_(damping)

    def _solve_gains_(self, damping: float) -> tuple[float, float, float]:
        ridge = damping * float(self._gram.diagonal().mean())
        damped = self._gram + max(ridge, torch.finfo(torch.float64).tiny) * torch.eye(
            len(self._gram), dtype=torch.float64, device=self._gram.device
        )
        change = torch.linalg.solve(damped, self._cross)
        left = self._error_square - 2 * float(change @ self._cross) + float(change @ self._gram @ change)
        for name in ("down_proj", "down_proj_bias"):
            if (tensor := getattr(self._experts, name, None)) is not None:
                factors = (1 + change).reshape(-1, *[1] * (tensor.ndim - 1))
                tensor.copy_((tensor.double() * factors).to(self._saved))
        total = max(self._target_square, torch.finfo(torch.float64).tiny)
        return self._error_square / total, max(left, 0.0) / total, float(torch.linalg.cond(damped))

    def _solve_each_(self, damping: float) -> tuple[float, float, float]:
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
