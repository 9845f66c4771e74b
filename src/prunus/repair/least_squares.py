"""Ridge regression from sums over tokens: what a projection's weights are solved from, and the solution.

    W' = argmin_W ‖X Wᵀ − T‖² + λ ‖W − W₀‖²  =  ((XᵀX + λ I)⁻¹ (XᵀT + λ W₀ᵀ))ᵀ,      λ = damping · mean diag(XᵀX)

X, (tokens, in_features), and T, (tokens, out_features), come piece by piece; only XᵀX, XᵀT and ‖T‖² are kept. Tokens of
several sources, whose activations may be of different size, weigh as if those were equal: the sums of each source are
divided by its mean ‖x‖² of a token,

    XᵀX = Σ_s X_sᵀX_s / e_s,    e_s = tr(X_sᵀX_s) / (tokens of s),    and XᵀT and ‖T‖² likewise,

so that a source counts by its share of the tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["NormalEquations", "TokenSums", "solve_ridge"]


#: XᵀX is added up in so many column blocks; of each only what lies on and above the diagonal
BLOCKS = 8
#: narrower blocks than this are slower than what they save
NARROWEST = 64


class TokenSums:
    """XᵀX, XᵀT and ‖T‖² as tokens come, in float32.

    Args:
        in_features: columns of the projection that is to be solved.
        out_features: its rows.
        device: where it is.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self._gram = zeros(in_features, in_features)
        self._cross = zeros(in_features, out_features)
        self._target_square = 0.0
        width = max(NARROWEST, -(-in_features // BLOCKS))
        self._edges = [*range(0, in_features, width), in_features]
        self._source, self._tokens = 0, 0
        #: the sums of sources that are complete; None while there is one
        self._complete: NormalEquations | None = None

    def add(self, x: Tensor, target: Tensor, source: int = 0) -> None:
        """Add tokens of a source; those of one source come one after the other.

        Args:
            x: float32, (tokens, in_features).
            target: float32, (tokens, out_features).
            source: number of the source.
        """
        if source != self._source and self._tokens:
            self._complete_source()
        self._source = source
        self._tokens += len(x)
        for start, stop in pairwise(self._edges):
            self._gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self._cross.addmm_(x.T, target)
        self._target_square += float(target.double().square().sum())

    def equations(self) -> NormalEquations:
        """What has been added up; nothing can be added any more."""
        if self._complete is not None:
            self._complete_source()
            self._gram, self._cross = self._complete.gram, self._complete.cross
            self._target_square = self._complete.target_square
        for start, stop in pairwise(self._edges):
            self._gram[stop:, start:stop] = self._gram[start:stop, stop:].T
        return NormalEquations(self._gram, self._cross, self._target_square)

    def _complete_source(self) -> None:
        """Add the sums of the source at work, at equal energy, to those of the sources before."""
        energy = float(self._gram.diagonal().double().sum()) / max(self._tokens, 1)
        scale = 1 / energy if energy > 0 else 0.0  # without energy there is nothing to scale
        gram, cross, square = self._gram.mul_(scale), self._cross.mul_(scale), self._target_square * scale
        if self._complete is not None:
            gram += self._complete.gram
            cross += self._complete.cross
            square += self._complete.target_square
        self._complete = NormalEquations(gram, cross, square)
        self._gram, self._cross = torch.zeros_like(gram), torch.zeros_like(cross)
        self._target_square, self._tokens = 0.0, 0


@dataclass(frozen=True)
class NormalEquations:
    """Sums over calibration tokens, float32.

    Attributes:
        gram: XᵀX, (in_features, in_features).
        cross: XᵀT, (in_features, out_features).
        target_square: ‖T‖².
    """

    gram: Tensor
    cross: Tensor
    target_square: float

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
