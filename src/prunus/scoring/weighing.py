"""The factor on attention: what an attention group counts for beside an MLP channel."""

from __future__ import annotations

import pandas as pd

from prunus.errors import OptionError
from prunus.option_values import check_positive
from prunus.selection.table import rank_table

__all__ = ["weigh_attention"]


def weigh_attention(table: pd.DataFrame, factor: float) -> pd.DataFrame:
    """Multiply the scores of attention groups; importances stay as they are.

    Args:
        table: see `prunus.selection.table`.
        factor: positive; 1 changes nothing.

    Returns:
        The table, ranked again.

    Raises:
        OptionError: the factor is not positive and finite; or a score is negative, so that a factor would reverse the
            order.
    """
    check_positive("attention_weight", factor)
    if factor == 1:
        return table
    if (table["score"] < 0).any():
        raise OptionError("the attention weight multiplies scores, and some are negative; use attention weight 1")
    factors = (table["group_type"] == "attention").map({True: factor, False: 1.0})
    return rank_table(table, scores=table["score"] * factors)
