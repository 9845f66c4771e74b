"""Ridge regression from sums over tokens: what a projection's weights are solved from, and the solution.

    W' = argmin_W ‖X Wᵀ − T‖² + λ ‖W − W₀‖²  =  ((XᵀX + λ I)⁻¹ (XᵀT + λ W₀ᵀ))ᵀ,      λ = damping · mean diag(XᵀX)

X, (tokens, in_features), and T, (tokens, out_features), come piece by piece; only XᵀX, XᵀT and ‖T‖² are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["NormalEquations", "solve_ridge"]


@dataclass
class NormalEquations:
    """Sums over calibration tokens, float32.

    Attributes:
        gram: XᵀX, (in_features, in_features).
        cross: XᵀT, (in_features, out_features).
        target_square: ‖T‖².
    """

    gram: Tensor
    cross: Tensor
    target_square: float = 0.0

    @classmethod
    def of(cls, module: nn.Linear) -> NormalEquations:
        """Empty sums for a projection."""
        zeros = partial(torch.zeros, dtype=torch.float32, device=module.weight.device)
        return cls(zeros(module.in_features, module.in_features), zeros(module.in_features, module.out_features))

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add tokens: x (tokens, in_features), target (tokens, out_features), both float32."""
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, target)
        self.target_square += float(target.double().square().sum())

    def error(self, weight: Tensor) -> float:
        """‖X Wᵀ − T‖² / ‖T‖² for a weight (out_features, in_features), float64."""
        gram, cross = self.gram.double(), self.cross.double()
        square = (weight @ gram).mul(weight).sum() - 2 * (weight * cross.T).sum() + self.target_square
        return float(square.clamp(min=0)) / max(self.target_square, torch.finfo(torch.float64).tiny)


def solve_ridge(gram: Tensor, cross: Tensor, weight: Tensor, damping: float) -> tuple[Tensor, float]:
    """Solve (G + λI) W'ᵀ = C + λ Wᵀ with λ = damping · mean diag(G), in float64.

    Args:
        gram: G = XᵀX, (in_features, in_features).
        cross: C = XᵀT, (in_features, out_features).
        weight: W, towards which the ridge pulls, (out_features, in_features).
        damping: λ as a share of the mean diagonal of G.

    Returns:
        W' (out_features, in_features), float64, and an estimate of the condition number of G + λI: the squared ratio of
        the largest to the smallest diagonal entry of its Cholesky factor, a lower bound.

    Raises:
        torch.linalg.LinAlgError: G + λI is not positive definite to working precision.
    """
    damped, prior = gram.to(torch.float64, copy=True), weight.double()
    ridge = damping * float(damped.diagonal().mean())
    damped.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(damped)
    solution = torch.cholesky_solve(cross.double() + ridge * prior.T, factor).T
    diagonal = factor.diagonal()
    return solution, float((diagonal.max() / diagonal.min()).square())
