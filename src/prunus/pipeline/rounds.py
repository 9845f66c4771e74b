"""Cutting in rounds: a part of the budget, repair, scores of the model that is left, the next part.

Scores describe the model they were taken on; after a large cut the remaining groups are worth something else. Every
round's table is written in the numbering of the dense model, so that constraints, budget and the plan mean the same in
all of them.

Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3.1 (iterative pruning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prunus.model.families import ALL_AXES
from prunus.option_values import check_whole
from prunus.selection.plan import Plan
from prunus.selection.table import rank_table

__all__ = ["Round", "carry_over", "schedule"]


@dataclass(frozen=True)
class Round:
    """One round of a cut.

    Later rounds decide less than the first, and only the last repair stays: they do with a part of the sequences.

    Attributes:
        number: counted from 1.
        share: of all parameters that is gone after it.
        last: whether it is the last one.
    """

    number: int
    share: float
    last: bool

    def scored_on(self, sequences: int) -> int:
        """How many of the calibration sequences its scores are taken on."""
        return sequences if self.number == 1 else max(1, sequences // 2)

    def repaired_on(self, sequences: int) -> int:
        """How many of the calibration sequences its repair is made on."""
        return sequences if self.last else max(1, sequences // 4)


def schedule(ratio: float, rounds: int) -> Sequence[Round]:
    """Rounds that each cut an equal part.

    Args:
        ratio: share of all parameters to remove in the end.
        rounds: how often to cut.

    Raises:
        OptionError: fewer than one round.
    """
    check_whole("rounds", rounds)
    return [Round(number, ratio * number / rounds, number == rounds) for number in range(1, rounds + 1)]


def carry_over(earlier: pd.DataFrame, plan: Plan, later: pd.DataFrame) -> pd.DataFrame:
    """One table of the dense model from that of an earlier round and that of the model it left.

    Args:
        earlier: table of the dense model that `plan` was chosen from.
        plan: what the earlier rounds kept.
        later: table of the model that `plan` leaves, in its own numbering.

    Returns:
        The groups that are left with their new importances and scores, in the numbering of the dense model; below them,
        in the order they had, those that are gone, with scores moved down to stay below. The same plan and every
        smaller one of the same constraints can be chosen from it again.
    """
    survivors = plan.surviving_layers
    parts = []
    for axis in ALL_AXES:
        rows = later[later["group_type"] == axis]
        for new_layer, groups in rows.groupby("layer_idx"):
            layer_idx = survivors[int(new_layer)]
            numbers = np.asarray(plan.layers[layer_idx][axis])
            parts.append(groups.assign(layer_idx=layer_idx, group_idx=numbers[groups["group_idx"].to_numpy()]))
    left = pd.concat(parts)
    keys = ["layer_idx", "group_type", "group_idx"]
    gone = earlier[~earlier.set_index(keys).index.isin(left.set_index(keys).index)]
    if len(gone):
        # Far enough below that rounding makes no ties between the last that is gone and the first that is left.
        spread = max(float(gone["score"].max() - gone["score"].min()), abs(float(left["score"].min())), 1e-300)
        floor = float(left["score"].min()) - spread
        gone = gone.assign(score=gone["score"] - gone["score"].max() + floor)
    table = pd.concat([gone, left], ignore_index=True)
    return rank_table(table, scores=table["score"])
