"""The global table: one row per group of the whole model, with its importance, cost and score.

Columns: `layer_idx, group_type, group_idx, importance, cost, score`, sorted by score, cheapest to cut first. The cost
is in parameters, or what `with_costs` put in their place. What a group is worth, its importance after normalisation, is
score · cost; where a group costs nothing, the score is that itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
from torch import Tensor

from prunus.errors import NonFiniteError, OptionError, PlanError
from prunus.files.csv_file import read_table
from prunus.files.outputs import whole_file
from prunus.model.families import ALL_AXES, Axis
from prunus.model.geometry import Geometry
from prunus.selection.costs import Costs

__all__ = [
    "COLUMNS",
    "NORMALIZATIONS",
    "Importance",
    "Normalization",
    "build_table",
    "check_table",
    "load_table",
    "normalised_importance",
    "normalize",
    "rank_table",
    "save_table",
    "with_costs",
]

COLUMNS = ("layer_idx", "group_type", "group_idx", "importance", "cost", "score")

Normalization = Literal["none", "layer_sum", "layer_mean"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

#: importance of every group: one mapping per decoder layer, axis → float64 of shape (groups,)
Importance = Sequence[Mapping[Axis, Tensor]]


def build_table(geometry: Geometry, importance: Importance, normalization: Normalization = "none") -> pd.DataFrame:
    """Rank every group of the model in one table.

    Args:
        geometry: shape of the model and parameters per group.
        importance: one mapping per layer, axis → float64 tensor of shape (groups,). Axes that a method says nothing
            about are left out, of all layers alike.
        normalization: how importances of different layers are made comparable, see `normalize`.

    Returns:
        One row per group with the columns `COLUMNS`; score = importance / cost, ascending.

    Raises:
        NonFiniteError: an importance is NaN or infinite; the layer is named.
    """
    parts = []
    for layer_idx, (widths, by_axis) in enumerate(zip(geometry.widths, importance, strict=True)):
        for axis in by_axis:
            values = by_axis[axis].double().cpu().numpy()
            if values.shape != (widths[axis],):
                raise PlanError(f"layer {layer_idx}, {axis}: {values.shape} importances for {widths[axis]} groups")
            if not np.isfinite(values).all():
                raise NonFiniteError(
                    f"layer {layer_idx}, {axis}: {np.count_nonzero(~np.isfinite(values))} of {values.size} importances "
                    "are NaN or infinite. Check the weights and the calibration loss; fp16 overflows easily, use "
                    "bf16 or fp32."
                )
            parts.append(
                pd.DataFrame(
                    {
                        "layer_idx": layer_idx,
                        "group_type": axis,
                        "group_idx": np.arange(values.size),
                        "importance": values,
                        "cost": geometry.group_parameters[axis],
                    }
                )
            )
    return rank_table(pd.concat(parts, ignore_index=True), normalization)


def rank_table(
    groups: pd.DataFrame, normalization: Normalization = "none", *, scores: pd.Series | None = None
) -> pd.DataFrame:
    """Score the groups by their normalised importance per cost, and sort; `importance` itself stays as it was.

    Ties are broken by layer, axis, importance and group, so that the order depends on nothing else.

    Args:
        groups: the columns `COLUMNS` except perhaps score.
        normalization: see `normalize`.
        scores: take these, one for each row of `groups`, instead.
    """
    if scores is not None:
        groups = groups.assign(score=scores)
    # Before the scores, too: ranks of ties, and the rounding of a layer's mean, would follow the order of the rows.
    table = groups.sort_values(["layer_idx", "group_type", "group_idx"], kind="stable", ignore_index=True)
    if scores is None:
        table["score"] = normalize(table, normalization) / table["cost"]
    table = table.sort_values(["score", "layer_idx", "group_type", "importance", "group_idx"], ignore_index=True)
    return table[list(COLUMNS)]


def normalised_importance(table: pd.DataFrame) -> pd.Series:
    """What each group is worth: its importance after all normalisation and weighing, whatever it costs."""
    return table["score"] * table["cost"].where(table["cost"] > 0, 1)


def with_costs(table: pd.DataFrame, costs: Costs) -> pd.DataFrame:
    """The same groups at other costs: what they are worth stays.

    Args:
        table: a global table, whatever its costs.
        costs: those of the model that the table is of.

    Returns:
        The table with `cost` and `score` anew; as it is where the costs are the same.
    """
    keys = zip(table["layer_idx"], table["group_type"], strict=True)
    cost = np.array([costs.group[layer_idx][axis] for layer_idx, axis in keys])
    if (cost == table["cost"].to_numpy()).all():
        return table
    return rank_table(table.assign(cost=cost), scores=normalised_importance(table) / np.where(cost > 0, cost, 1))


def normalize(groups: pd.DataFrame, normalization: Normalization) -> pd.Series:
    """Importances made comparable across layers: each layer and axis is normalised by itself.

    ========== ==========================================================================================
    none       as they are
    layer_sum  share of the layer's sum, times the layer's groups and cost: every layer and axis has mean score 1
    layer_mean divided by the layer's mean: mean importance 1, so that costs still weigh between the axes
    ========== ==========================================================================================

    Args:
        groups: a table with at least layer_idx, group_type, importance and cost.
        normalization: one of `NORMALIZATIONS`.

    Returns:
        float64, aligned with the table's rows.

    Raises:
        OptionError: unknown normalisation.
    """
    if normalization not in NORMALIZATIONS:
        raise OptionError(f"`normalize` {normalization!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}")
    importance, cost = groups["importance"].astype(float), groups["cost"]
    if normalization == "none":
        return importance
    by_layer = importance.groupby([groups["layer_idx"], groups["group_type"]])
    mean = by_layer.transform("mean")
    # A layer whose importances are all zero has nothing to share out: its groups stay at zero.
    relative = importance / mean.replace(0.0, 1.0)
    return relative * cost if normalization == "layer_sum" else relative


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV; numbers keep every digit."""
    with whole_file(path) as partial:
        table.to_csv(partial, index=False)


def load_table(path: str | Path) -> pd.DataFrame:
    """Read and check a table.

    Raises:
        PlanError: the file is unreadable, lacks columns, or holds values that are not groups.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is no file"
        raise PlanError(f"cannot read the table {path}: it {found}; name the groups.csv that `prunus score` wrote")
    try:
        table = read_table(path, ["group_type"])
    except (OSError, ValueError, OverflowError, MemoryError) as error:  # ParserError is a ValueError
        raise PlanError(f"cannot read the table {path}: {error}") from error
    return check_table(table, str(path))


def check_table(table: pd.DataFrame, source: str = "the table") -> pd.DataFrame:
    """Raise unless a table has the columns, types and values of one that `build_table` makes.

    Raises:
        PlanError: naming the column and the first bad row.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise PlanError(f"{source} has no column {', '.join(missing)}; it has {_some(table.columns)}")
    if table.empty:
        raise PlanError(f"{source} has no rows")
    for column in ("layer_idx", "group_idx"):
        if not pd.api.types.is_integer_dtype(table[column]) or (table[column] < 0).any():
            raise PlanError(f"{source}: column {column} must hold non-negative whole numbers")
    for column in ("importance", "cost", "score"):
        numbers = table[column]
        if numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
            raise PlanError(f"{source}: column {column} holds values that are not finite numbers")
    if (table["cost"] < 0).any():
        raise PlanError(f"{source}: column cost must hold non-negative numbers")
    unknown = set(table["group_type"]) - set(ALL_AXES)
    if unknown:
        raise PlanError(f"{source}: group_type {sorted(map(str, unknown))[0]!r} is not one of {', '.join(ALL_AXES)}")
    if table.duplicated(["layer_idx", "group_type", "group_idx"]).any():
        row = table[table.duplicated(["layer_idx", "group_type", "group_idx"])].iloc[0]
        raise PlanError(f"{source}: layer {row.layer_idx} {row.group_type} group {row.group_idx} stands there twice")
    counts = table.groupby(["layer_idx", "group_type"])["group_idx"].agg(["size", "max"])
    if (counts["size"] != counts["max"] + 1).any():
        layer_idx, axis = counts.index[(counts["size"] != counts["max"] + 1).to_numpy().argmax()]
        raise PlanError(f"{source}: layer {layer_idx} {axis} lacks groups; a table must list every group of the model")
    return table


def _some(columns: Iterable[object]) -> str:
    """Names of columns for a message, whatever a damaged file calls them."""
    names = ", ".join(map(str, columns))
    return names if len(names) <= 200 else f"{names[:200]}…"
