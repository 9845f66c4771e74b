"""Ridge regression from sums over tokens: what a projection's weights are solved from, and the solution.

    W' = argmin_W ‖X Wᵀ − T‖² + λ ‖W − W₀‖²  =  ((XᵀX + λ I)⁻¹ (XᵀT + λ W₀ᵀ))ᵀ,      λ = damping · mean diag(XᵀX)

X, (tokens, in_features), and T, (tokens, out_features), come piece by piece; only XᵀX, XᵀT and ‖T‖² are kept. Tokens of
several sources, whose activations may be of different size, weigh as if those were equal: the sums of each source are
divided by its mean ‖x‖² of a token,

    XᵀX = Σ_s X_sᵀX_s / e_s,    e_s = tr(X_sᵀX_s) / (tokens of s),    and XᵀT and ‖T‖² likewise,

so that a source counts by its share of the tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["NormalEquations", "Solution", "TokenSums", "solve_ridge_"]


#: XᵀX is added up in so many column blocks; of each only what lies on and above the diagonal
BLOCKS = 8
#: narrower blocks than this are slower than what they save
NARROWEST = 64
#: rows of a projection that are in float64 at a time, and columns of XᵀX: XᵀX of a large model takes gigabytes
AT_ONCE = 1024


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


@dataclass
class NormalEquations:
    """Sums over calibration tokens, float32, until they are solved.

    Attributes:
        gram: XᵀX, (in_features, in_features).
        cross: XᵀT, (in_features, out_features).
        target_square: ‖T‖².
    """

    gram: Tensor
    cross: Tensor
    target_square: float

    def error(self, weight: Tensor) -> float:
        """‖X Wᵀ − T‖² / ‖T‖² for a weight (out_features, in_features), computed in float64."""
        explained = 0.0
        for rows in _parts(len(weight)):
            part = weight[rows].double()
            explained += 2 * float((part * self.cross[:, rows].T).sum()) - _quadratic(part, self.gram)
        return self._relative(self.target_square - explained)

    def _relative(self, square: float) -> float:
        return max(square, 0.0) / max(self.target_square, torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Solution:
    """What minimises a ridge problem.

    Attributes:
        weight: W', (out_features, in_features), float64.
        error: ‖X W'ᵀ − T‖² / ‖T‖².
        condition: an estimate of the condition number of G + λI: the squared ratio of the largest to the smallest
            diagonal entry of its Cholesky factor, a lower bound.
    """

    weight: Tensor
    error: float
    condition: float


def solve_ridge_(equations: NormalEquations, weight: Tensor, damping: float) -> Solution:
    """Solve (G + λI) W'ᵀ = C + λ Wᵀ with λ = damping · mean diag(G), in float64.

    G is let go for its copy in float64, which is factored in place: beside that there are W' and parts of `AT_ONCE`
    rows of it. The error takes no product with G: the solution satisfies G W'ᵀ = C + λ (W − W')ᵀ, so that
    ‖X W'ᵀ − T‖² = ‖T‖² − tr W'C + λ tr W'(W − W')ᵀ.

    Args:
        equations: G = XᵀX, C = XᵀT and ‖T‖²; they are used up.
        weight: W, towards which the ridge pulls, (out_features, in_features).
        damping: λ as a share of the mean diagonal of G.

    Raises:
        torch.linalg.LinAlgError: G + λI is not positive definite to working precision.
    """
    factor = equations.gram.to(torch.float64, copy=True)
    equations.gram = factor.new_empty(0)
    ridge = damping * float(factor.diagonal().mean())
    factor.diagonal().add_(ridge)
    factor = _factored_(factor)
    solution = torch.empty(weight.shape, dtype=torch.float64, device=factor.device)
    explained = 0.0
    for rows in _parts(len(weight)):
        old, cross = weight[rows].double(), equations.cross[:, rows].double()
        half = torch.linalg.solve_triangular(factor, cross + ridge * old.T, upper=False)
        new = torch.linalg.solve_triangular(factor.mT, half, upper=True).T
        explained += float((new * cross.T).sum() - ridge * (new * (old - new)).sum())
        solution[rows] = new
    diagonal = factor.diagonal()
    condition = float((diagonal.max() / diagonal.min()).square())
    return Solution(solution, equations._relative(equations.target_square - explained), condition)


def _factored_(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a symmetric matrix, in its memory."""
    # Its transpose is itself, and column by column in memory, as LAPACK wants it: nothing is copied.
    factor, info = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"the leading minor of order {int(info)} is not positive definite"
        )
    return factor


def _quadratic(rows: Tensor, gram: Tensor) -> float:
    """tr(R G Rᵀ) of rows R, (any, n), float64, and a symmetric G, (n, n), of which what lies below is not looked at."""
    total = 0.0
    for part in _parts(len(gram)):
        product = rows[:, part] @ gram[part, part.start :].double()
        on_diagonal = product[:, : part.stop - part.start] * rows[:, part]
        total += float(2 * (product * rows[:, part.start :]).sum() - on_diagonal.sum())
    return total


def _parts(count: int) -> Iterator[slice]:
    """Slices of `AT_ONCE` of so many."""
    return (slice(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE))
