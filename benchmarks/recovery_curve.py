"""How the share of a gap that training closes grows with tokens: a fit, and what it says beyond what was measured.

What is left of the gap, 1 - closed, is taken to fall as a power of the tokens t, from 1 at none:

    left(t) = (1 + t / c) ^ -b

c and b by least squares of log left, c among 400 values from a hundredth of the least to a hundred times the most
tokens. Loss falls as a power of data where a model is trained from random weights (Hestness et al. 2017,
https://arxiv.org/abs/1712.00409); that it does here, towards the dense model's loss, is an assumption: a smaller model
may never get there. Beyond the last point this is an extrapolation, and is called that wherever it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prunus.recovery.curve import curve

__all__ = ["Fit", "fit", "points_of_run"]

#: of a gap that is closed or overshot, a share that has a logarithm
LEAST_LEFT = 1e-6


@dataclass(frozen=True)
class Fit:
    """The curve.

    Attributes:
        c: tokens.
        b: exponent.
        error: root of the mean square error of log left.
        points: number of points.
        most_tokens: tokens of the last point.
    """

    c: float
    b: float
    error: float
    points: int
    most_tokens: float

    def closed(self, tokens: float) -> float:
        """Share of the gap that is closed."""
        return 1 - (1 + tokens / self.c) ** -self.b

    def at(self, tokens: float) -> dict[str, Any]:
        """The share at a number of tokens, and whether that is beyond what was measured."""
        return {"tokens": tokens, "gap_closed": self.closed(tokens), "extrapolation": tokens > self.most_tokens}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """The curve through points (tokens, share closed); None with fewer than two of them at different tokens above 0."""
    used = [(tokens, closed) for tokens, closed in points if tokens > 0]
    if len({tokens for tokens, _ in used}) < 2:
        return None
    tokens = np.array([each for each, _ in used])
    left = np.log(np.maximum(1 - np.array([closed for _, closed in used]), LEAST_LEFT))
    best: tuple[float, float, float] | None = None
    for c in np.geomspace(tokens.min() / 100, tokens.max() * 100, 400):
        x = np.log1p(tokens / c)
        b = -float(x @ left) / float(x @ x)
        error = math.sqrt(float(np.mean((left + b * x) ** 2)))
        if best is None or error < best[0]:
            best = error, float(c), b
    assert best is not None
    error, c, b = best
    return Fit(c, b, error, len(used), float(tokens.max()))


def points_of_run(facts: dict[str, Any]) -> list[dict[str, float]]:
    """What a run logged: tokens, minutes of training, and the share of the held-out gap that was closed by then.

    Nothing where there is no gap, or no dense model was needed to train.
    """
    loss = facts["held_out_loss"]
    gap = 0.0 if loss["dense"] is None else loss["before"] - loss["dense"]
    return [
        {
            "tokens": point["tokens"],
            "minutes": round(point["seconds"] / 60, 3),
            "gap_closed": (loss["before"] - point["held_out_loss"]) / gap,
        }
        for point in (curve([facts])[1:] if gap > 0 else ())
    ]
