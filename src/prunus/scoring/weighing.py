"""Factors on scores, by axis and layer: what a whole block counts for, beside what its groups are worth in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from prunus.errors import OptionError
from prunus.model.families import AXES, Axis
from prunus.selection.table import rank_table

__all__ = ["weigh_scores"]


def weigh_scores(table: pd.DataFrame, factors: Mapping[Axis, Sequence[float]]) -> pd.DataFrame:
    """Multiply the scores of a table; importances stay as they are.

    Args:
        table: see `prunus.selection.table`.
        factors: axis → one factor per decoder layer; an axis that is not there keeps its scores.

    Returns:
        The table, ranked again.

    Raises:
        OptionError: a score is negative, so that a factor would turn the order around.
    """
    if (table["score"] < 0).any():
        raise OptionError(
            "layer priors and the attention weight multiply scores, and some are negative (zscore): choose another "
            "normalisation"
        )
    each = np.ones(len(table))
    for axis in AXES:
        if axis in factors:
            rows = (table["group_type"] == axis).to_numpy()
            each[rows] = np.asarray(factors[axis], dtype=float)[table["layer_idx"].to_numpy()[rows]]
    return rank_table(table, scores=table["score"] * each)
