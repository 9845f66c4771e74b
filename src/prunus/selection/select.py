"""From the global table to a plan: cut the lowest scores until the budget is met. Never sees the model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from prunus.errors import BudgetError, OptionError, PlanError
from prunus.model.families import Axis
from prunus.model.geometry import Geometry
from prunus.option_values import is_number
from prunus.selection.constraints import ALIGNMENTS, Constraints, ModelConstraints
from prunus.selection.costs import Costs, amount_of, largest_ratio, parameter_costs
from prunus.selection.nearness import check_least, check_near, units_to_cut
from prunus.selection.plan import Plan
from prunus.selection.shapes import (
    Cut,
    cut_depth,
    cut_uniform,
    least_depth,
    least_uniform,
    reachable_depth,
    reachable_uniform,
)
from prunus.selection.table import check_table, with_costs

__all__ = [
    "ALIGNMENTS",
    "Constraints",
    "check_ratio",
    "check_reachable",
    "cut_candidates",
    "reachable",
    "reachable_parameters",
    "select",
]


def select(
    table: pd.DataFrame,
    geometry: Geometry,
    ratio: float,
    constraints: Constraints | None = None,
    costs: Costs | None = None,
    *,
    last: bool = True,
) -> Plan:
    """Cut the cheapest groups of the whole model until `ratio` of all its parameters, or of another quantity, is gone.

    With `align` 1 the unit of cutting is a group, and the budget is passed by less than one group (and the norm of a
    block that empties with it). With a larger `align`, channels of a layer go in bundles, ranked by their mean score;
    the groups of an indivisible block are one bundle. Where bundles, or a shape, would pass the budget by far, the cut
    may stay below it, and says so, see `prunus.selection.nearness`.

    Args:
        table: the global table, see `prunus.selection.table`; at whatever costs, as groups are ranked at `costs`.
        geometry: shape of the model the table was made for.
        ratio: share of the quantity to remove, in [0, 1).
        constraints: what may be cut.
        costs: the quantity; parameters by default.
        last: False for a cut that others follow; how far off it is, is not said.

    Returns:
        The plan.

    Raises:
        OptionError: ratio outside [0, 1), or constraints that do not fit the model or the quantity.
        BudgetError: the constraints leave too little to cut, or nothing that is near; what can be had is named.
        PlanError: the table is malformed or was made for a model of another shape.
    """
    decided, costs = (constraints or Constraints()).of(geometry), costs or parameter_costs(geometry)
    _check_enough(geometry, ratio, decided, costs)
    _check_same_shape(check_table(table), geometry, decided)
    table, target = with_costs(table, costs), amount_of(ratio, costs.total)
    shapes = {"ragged": _cut_ragged, "uniform": cut_uniform, "depth": cut_depth}
    cut, possible = shapes[decided.shape](table, geometry, decided, costs, target)
    plan = _without(cut, geometry)
    if last:
        check_near(costs.total - costs.left(plan.kept_widths), possible, ratio, decided, costs)
    return plan


def _cut_ragged(
    table: pd.DataFrame, geometry: Geometry, constraints: ModelConstraints, costs: Costs, target: float
) -> tuple[Cut, list[float]]:
    """Cut candidates from the top until they save `target`, or nearly.

    Returns:
        The groups that go, and what the first candidate saves, the first two, and so on.
    """
    candidates = cut_candidates(table, geometry, constraints, costs)
    saved = candidates["cost"].cumsum().to_numpy()
    single = [len(groups) == 1 for groups in candidates["groups"]]
    cut: dict[tuple[int, Axis], set[int]] = {}
    for row in candidates.iloc[: units_to_cut(saved, target, costs.total, single, constraints.at_least)].itertuples():
        cut.setdefault((row.layer_idx, row.group_type), set()).update(row.groups)
    return cut, saved.tolist()


def _without(cut: Cut, geometry: Geometry) -> Plan:
    """The plan that keeps everything else."""
    gone = {key: set(groups) for key, groups in cut.items()}
    kept: list[dict[Axis, Iterable[int]]] = [
        {
            axis: [group for group in range(widths[axis]) if group not in gone.get((layer_idx, axis), ())]
            for axis in geometry.axes
        }
        for layer_idx, widths in enumerate(geometry.widths)
    ]
    return Plan.from_kept(geometry, kept)


def check_ratio(ratio: float, quantity: str = "parameters", name: str = "ratio") -> None:
    """Raise unless a ratio is one.

    Args:
        ratio: what was asked for.
        quantity: what it is a share of.
        name: of the setting.

    Raises:
        OptionError: it is not in [0, 1).
    """
    if not is_number(ratio) or not 0 <= ratio < 1:
        percent = f". For {ratio:g} % write {ratio / 100:g}" if is_number(ratio) and 1 <= ratio < 100 else ""
        raise OptionError(f"`{name}` is {ratio}; it is a share of all {quantity} and must lie in [0, 1){percent}")


def check_reachable(
    geometry: Geometry, ratio: float, constraints: Constraints | None = None, costs: Costs | None = None
) -> None:
    """Raise if no table whatever could reach a ratio under the constraints; needs no scores, so it can come first.

    Args:
        geometry: shape of the model.
        ratio: share of the quantity to remove.
        constraints: what may be cut.
        costs: the quantity; parameters by default.

    Raises:
        OptionError: ratio outside [0, 1), or constraints that do not fit the model or the quantity.
        BudgetError: the constraints leave too little to cut, or nothing that is near; what can be had is named.
    """
    decided, costs = (constraints or Constraints()).of(geometry), costs or parameter_costs(geometry)
    _check_enough(geometry, ratio, decided, costs)
    check_least(_least(geometry, decided, costs), ratio, decided, costs)


def _check_enough(geometry: Geometry, ratio: float, constraints: ModelConstraints, costs: Costs) -> None:
    """Raise if less than a ratio can go under the constraints."""
    check_ratio(ratio, costs.quantity)
    most, total = reachable(geometry, constraints, costs), costs.total
    if ratio and not total:
        raise BudgetError(f"the model has no {costs.quantity} that could be removed; choose another target")
    if (target := amount_of(ratio, total)) > most:
        raise BudgetError(
            f"`ratio` {ratio:g} means removing {target:,.0f} of {total:,.0f} {costs.quantity}, but only "
            f"{most:,.0f} can go under these constraints: the largest reachable ratio is "
            f"{largest_ratio(most, total):g}. Ask for less, or relax layer range, min-keep, "
            f"axes or shape.{_why_experts_stay(geometry, constraints)}"
        )


def _why_experts_stay(geometry: Geometry, constraints: ModelConstraints) -> str:
    if "expert" not in constraints.axes or not constraints.experts_needed:
        return ""
    return (
        f" Each token goes to {geometry.experts_per_token} experts (num_experts_per_tok), so that every layer keeps at "
        f"least {constraints.experts_needed}."
    )


def reachable_parameters(geometry: Geometry, constraints: Constraints) -> int:
    """Number of parameters that can go at most under the constraints, leaving a model with at least one block."""
    return int(reachable(geometry, constraints, parameter_costs(geometry)))


def reachable(geometry: Geometry, constraints: Constraints, costs: Costs) -> float:
    """How much of a quantity can go at most under the constraints, leaving a model with at least one block.

    Raises:
        OptionError: constraints that do not fit the model or the quantity.
    """
    constraints = constraints.of(geometry)
    if constraints.shape != "ragged":
        reach = reachable_uniform if constraints.shape == "uniform" else reachable_depth
        return reach(geometry, constraints, costs)
    most: float = 0
    protected, largest_saving = False, 0.0
    allowed = constraints.layers(len(geometry.widths))
    for layer_idx, widths in enumerate(geometry.widths):
        for block in geometry.blocks(layer_idx):
            axis, width = block.axis, widths[block.axis]
            bounds = []
            if layer_idx in allowed and axis in constraints.axes and costs.group[layer_idx][axis]:
                bundle = constraints.bundle(block, width)
                bounds = _bundle_bounds(width, constraints.least(axis), bundle)
            cut = bounds[-1][1] if bounds else 0
            most += costs.saved(layer_idx, axis, width, width - cut)
            protected = protected or cut < width
            if bounds:
                start, stop = bounds[-1]
                largest_saving = max(largest_saving, costs.saved(layer_idx, axis, width - start, width - stop))
    # Where nothing is protected, a model without any block is none: the last bundle of some block, which for all we
    # know saves most, has to stay.
    return most if protected else most - largest_saving


def _least(geometry: Geometry, constraints: ModelConstraints, costs: Costs) -> float:
    """The least that any cut saves; 0 where single groups can go, or nothing."""
    if constraints.shape != "ragged":
        least = least_uniform if constraints.shape == "uniform" else least_depth
        return least(geometry, constraints, costs)
    first = []
    for layer_idx in constraints.layers(len(geometry.widths)):
        for axis in constraints.axes:
            width = geometry.widths[layer_idx][axis]
            bundle = constraints.bundle(geometry.family.block(axis), width)
            bounds = _bundle_bounds(width, constraints.least(axis), bundle)
            if bounds and costs.group[layer_idx][axis]:
                cut = bounds[0][1]
                first.append(costs.saved(layer_idx, axis, width, width - cut) if cut > 1 else 0.0)
    return min(first, default=0.0)


def cut_candidates(
    table: pd.DataFrame, geometry: Geometry, constraints: Constraints, costs: Costs | None = None
) -> pd.DataFrame:
    """The units that may be cut, cheapest first.

    Args:
        table: the global table, at `costs`.
        geometry: shape of the model.
        constraints: what may be cut.
        costs: the quantity; parameters by default.

    Returns:
        Columns layer_idx, group_type, groups (tuple of group indices cut together), score (the bundle's mean) and cost
        (what it saves when its turn comes; of parameters including a block's norms for the bundle that empties it).
    """
    constraints, costs = constraints.of(geometry), costs or parameter_costs(geometry)
    bundles = []
    allowed = set(constraints.layers(len(geometry.widths)))
    for (layer_idx, axis), rows in table.groupby(["layer_idx", "group_type"], sort=True):
        if layer_idx not in allowed or axis not in constraints.axes or not costs.group[layer_idx][axis]:
            continue
        rows = rows.sort_values(["score", "group_idx"], kind="stable")
        groups, scores = rows["group_idx"].to_numpy(), rows["score"].to_numpy()
        bundle = constraints.bundle(geometry.family.block(axis), len(rows))
        bounds = _bundle_bounds(len(rows), constraints.least(axis), bundle)
        # Never below the bundle before: the means of equal scores differ in their last digit, and a bundle that
        # overtook another would leave a width that is no multiple.
        means = np.maximum.accumulate([scores[start:stop].mean() for start, stop in bounds])
        for (start, stop), mean in zip(bounds, means, strict=True):
            cost = costs.saved(layer_idx, axis, len(rows) - start, len(rows) - stop)
            bundles.append((layer_idx, axis, start, tuple(groups[start:stop]), mean, cost))
    frame = pd.DataFrame(bundles, columns=["layer_idx", "group_type", "order", "groups", "score", "cost"])
    return frame.sort_values(["score", "layer_idx", "group_type", "order"], kind="stable", ignore_index=True)


def _bundle_bounds(groups: int, min_keep: int, align: int) -> list[tuple[int, int]]:
    """Split a layer's groups, in cutting order, into bundles that leave multiples of `align`."""
    bounds, cut = [], 0
    while cut < groups:
        after = (groups - cut - 1) // align * align  # the largest allowed width below the present one
        if after < min_keep:
            break
        bounds.append((cut, groups - after))
        cut = groups - after
    return bounds


def _check_same_shape(table: pd.DataFrame, geometry: Geometry, constraints: ModelConstraints) -> None:
    """Raise unless a table is of a model of this shape, and says something about all that may be cut."""
    scored = set(table["group_type"])
    if silent := [axis for axis in constraints.axes if axis not in scored and any(w[axis] for w in geometry.widths)]:
        raise OptionError(
            f"`axes` has {silent[0]}, of which the table says nothing (it is of {', '.join(sorted(scored))}): choose a "
            "method that scores it, or leave it out of `axes`"
        )
    counts = table.groupby(["layer_idx", "group_type"]).size()
    expected: dict[tuple[int, str], int] = {
        (layer_idx, axis): widths[axis]
        for layer_idx, widths in enumerate(geometry.widths)
        for axis in geometry.axes
        if widths[axis] and axis in scored
    }
    found = {(int(layer_idx), str(axis)): int(size) for (layer_idx, axis), size in counts.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key, 0) != found.get(key, 0):
            raise PlanError(
                f"layer {key[0]} {key[1]}: the table lists {found.get(key, 0)} groups, the model has "
                f"{expected.get(key, 0)}"
            )
