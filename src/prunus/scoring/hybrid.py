"""Several methods weighed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from prunus.errors import OptionError
from prunus.importance.registry import get_method
from prunus.option_values import check_positive
from prunus.selection.table import normalize, rank_table

__all__ = ["DEFAULT_MIX", "Weights", "check_weights", "mix"]

#: methods and how much each counts
Weights = Sequence[tuple[str, float]]
DEFAULT_MIX: Weights = (("taylor", 0.5), ("wanda", 0.5))


def check_weights(weights: Weights) -> None:
    """Raise unless methods can be weighed so.

    Raises:
        OptionError: no method, one that is unknown or named twice, or weights that are not positive.
    """
    names = [name for name, _ in weights]
    for name in names:
        get_method(name)
    if not names or len(set(names)) < len(names):
        raise OptionError(
            f"`hybrid` names the methods {', '.join(names) or 'none'}; name each once, e.g. taylor=0.5,wanda=0.5"
        )
    for name, weight in weights:
        check_positive(f"hybrid.{name}", weight)


def mix(tables: Mapping[str, pd.DataFrame], weights: Weights) -> pd.DataFrame:
    """Hybrid: Σ wₘ · normalised importanceₘ, so that each part has mean score 1 before it is weighed.

    A method whose raw scores are on one scale in all layers is divided by its mean score over the whole model, which
    leaves its ranking as it is. One whose scores are not is normalised over each layer and axis (`layer_sum`), which
    leaves only its ranking within the layer.

    Args:
        tables: the global table of each part, see `prunus.selection.table.build_table`.
        weights: methods and how much each counts; they are divided by their sum.

    Returns:
        The global table of the combination.
    """
    keys = ["layer_idx", "group_type", "group_idx"]
    total = sum(weight for _, weight in weights)
    mixed: pd.DataFrame | None = None
    for name, weight in weights:
        part = tables[name].sort_values(keys, ignore_index=True)
        if get_method(name).comparable:
            mean = float((part["importance"] / part["cost"]).mean())
            values = part["importance"] / (mean or 1.0)
        else:
            values = normalize(part, "layer_sum")
        if mixed is None:
            mixed = part.assign(importance=0.0)
        mixed["importance"] += weight / total * values
    assert mixed is not None
    return rank_table(mixed)
