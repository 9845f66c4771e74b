"""The form of a cut: which layers lose what, so that the result fits the loaders that it has to fit.

========= ==================================================================================================
ragged    group by group, wherever the score is lowest; layers end up with unequal widths
uniform   every layer keeps the same number of attention groups, of channels and of experts
depth     whole decoder layers go (with one axis: whole blocks of it), those with the lowest score
========= ==================================================================================================

Stock classes load the results of `uniform`, and of `depth` on both axes, without any code of prunus.

What a set of groups is worth is Σ score · cost over it, see `prunus.selection.table.worth`: its importance, after the
normalisation that the table was ranked with. `uniform` tries every number of attention groups (with three
axes, of attention groups and channels), cuts channels (experts) down to the budget, and keeps the plan that loses the
least. Layers of different kinds, with experts and without, are equally wide among themselves. `depth` ranks layers by
their worth over the costs of their groups, the mean importance per parameter (or FLOP, …) of what they hold. Groups
that save nothing go with the layer that they stand in. Where the budget would be passed by far, the nearest plan is
taken, see `prunus.selection.nearness`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np
import pandas as pd

from prunus.errors import OptionError
from prunus.model.families import Axis
from prunus.model.geometry import Geometry
from prunus.selection.constraints import Constraints, ModelConstraints
from prunus.selection.costs import Costs
from prunus.selection.nearness import NEAR, units_to_cut
from prunus.selection.table import normalised_importance

__all__ = [
    "Cut",
    "cut_depth",
    "cut_uniform",
    "least_depth",
    "least_uniform",
    "reachable_depth",
    "reachable_uniform",
    "uniform_widths",
]

#: (layer_idx, axis) → group indices that go
Cut = Mapping[tuple[int, Axis], Iterable[int]]


@dataclass(frozen=True)
class Unit:
    """Blocks of one decoder layer that go together.

    Attributes:
        layer_idx: the decoder layer.
        axes: its blocks.
        cost: what leaves with them; of parameters, norms included.
    """

    layer_idx: int
    axes: tuple[Axis, ...]
    cost: float


def uniform_widths(geometry: Geometry, constraints: Constraints, costs: Costs, target: float) -> list[tuple[int, ...]]:
    """Equal widths that save at least `target`, with as many channels as possible for each number of attention groups.

    Args:
        geometry: shape of the model.
        constraints: what may be cut.
        costs: the quantity.
        target: how much of it is to be saved.

    Returns:
        Of each of the family's axes the width: `(attention groups, channels)`, by descending number of attention
        groups; of three axes, as many experts as possible for each pair of the others. Empty if no equal widths save
        so much. All blocks stay in every layer; 0 stands for an axis that no layer has.

    Raises:
        OptionError: see `reachable_uniform`.
    """
    allowed = _equal_widths(geometry, constraints.of(geometry))
    *others, last = geometry.axes
    found: list[tuple[int, ...]] = []
    for widths in product(*(allowed[axis] for axis in others)):
        already = sum(_saved(costs, axis, width) for axis, width in zip(others, widths, strict=True))
        for width in allowed[last]:
            if already + _saved(costs, last, width) >= target:
                found.append((*widths, width))
                break
    return found


def reachable_uniform(geometry: Geometry, constraints: ModelConstraints, costs: Costs) -> float:
    """How much equal widths can save at most.

    Raises:
        OptionError: some layers may not be cut, an axis that may not be cut has unequal widths, or no width of an axis
            suits every layer.
    """
    allowed = _equal_widths(geometry, constraints)
    return sum(_saved(costs, axis, allowed[axis][-1]) for axis in geometry.axes)


def _equal_widths(geometry: Geometry, constraints: ModelConstraints) -> dict[Axis, list[int]]:
    """Per axis the widths that every layer can have, the largest first."""
    layers = len(geometry.widths)
    if constraints.layers(layers) != range(layers):
        raise OptionError(
            "`shape=uniform` cuts every layer alike, which a layer range excludes; leave out "
            "layer-start and layer-end, or choose another shape"
        )
    allowed: dict[Axis, list[int]] = {}
    for axis in geometry.axes:
        blocks = [(layer_idx, block) for layer_idx in range(layers) if (block := geometry.block(layer_idx, axis))]
        widths = [geometry.widths[layer_idx][axis] for layer_idx, _ in blocks]
        if not blocks:
            allowed[axis] = [0]
        elif axis in constraints.axes:
            block, narrowest = blocks[0][1], min(widths)
            if block.indivisible and narrowest < max(widths):
                raise OptionError(
                    f"`shape=uniform`: the layers have {narrowest} to {max(widths)} {axis} groups, which in "
                    f"{geometry.family.title} stay or go together; choose another shape"
                )
            if len({each.beside_experts for _, each in blocks}) > 1:
                raise OptionError(
                    f"`shape=uniform`: the layers have {min(widths)} to {max(widths)} {axis} groups, of shared experts "
                    f"and of layers without experts, which no class loads in equal numbers; leave {axis} out of `axes`"
                )
            bundle = constraints.bundle(block, narrowest)
            whole = [narrowest] if min(widths) == max(widths) else []
            below = [n for n in range(narrowest // bundle * bundle, 0, -bundle) if n >= constraints.least(axis)]
            allowed[axis] = [n for n in dict.fromkeys([*whole, *below]) if n]
            if not allowed[axis]:
                raise OptionError(
                    f"`shape=uniform`: the narrowest layer has {narrowest} {axis} groups, of which no number from "
                    f"{max(1, constraints.least(axis))} on is a multiple of {bundle}; choose another shape"
                )
        else:
            allowed[axis] = [max(widths)]
            for kind in {each for _, each in blocks}:
                of_kind = [geometry.widths[layer_idx][axis] for layer_idx, each in blocks if each == kind]
                if min(of_kind) < max(of_kind):
                    raise OptionError(
                        f"`shape=uniform`: the layers have {min(of_kind)} to {max(of_kind)} {axis} groups, and axes "
                        f"leaves out {axis}; add it, or choose another shape"
                    )
    return allowed


def least_uniform(geometry: Geometry, constraints: ModelConstraints, costs: Costs) -> float:
    """The least that equal widths save which cut anything at all."""
    savings = _uniform_savings(geometry, constraints, costs).values()
    return min((saved for saved in savings if saved > 0), default=0.0)


def _uniform_savings(geometry: Geometry, constraints: ModelConstraints, costs: Costs) -> dict[tuple[int, ...], float]:
    """What equal widths save, by the width of each of the family's axes."""
    allowed = _equal_widths(geometry, constraints)
    saved = {axis: {width: _saved(costs, axis, width) for width in allowed[axis]} for axis in geometry.axes}
    return {
        widths: sum(saved[axis][width] for axis, width in zip(geometry.axes, widths, strict=True))
        for widths in product(*(allowed[axis] for axis in geometry.axes))
    }


def cut_uniform(
    table: pd.DataFrame, geometry: Geometry, constraints: ModelConstraints, costs: Costs, target: float
) -> tuple[Cut, list[float]]:
    """Cut every layer to the same widths, its least important groups first.

    Args:
        table: the global table, at `costs`.
        geometry: shape of the model.
        constraints: what may be cut.
        costs: the quantity.
        target: how much of it is to be saved, at most `reachable_uniform`.

    Returns:
        The groups that go: of the widths in `uniform_widths` that do not save too much, those that lose the least
        importance; where all do, the nearest. And what each pair of equal widths saves.
    """
    ranked: dict[tuple[int, Axis], pd.DataFrame] = {
        (int(layer_idx), axis): rows.sort_values(["score", "group_idx"], kind="stable")
        for (layer_idx, axis), rows in table.groupby(["layer_idx", "group_type"])
    }
    # sums_of[key][n]: what the n least important groups of a layer and axis are worth together
    sums_of = {
        key: np.concatenate([[0.0], normalised_importance(rows).cumsum().to_numpy()]) for key, rows in ranked.items()
    }

    def lost(widths: tuple[int, ...]) -> float:
        keep = dict(zip(geometry.axes, widths, strict=True))
        return float(sum(sums[max(0, len(sums) - 1 - keep[axis])] for (_, axis), sums in sums_of.items()))

    savings = _uniform_savings(geometry, constraints, costs)
    enough = uniform_widths(geometry, constraints, costs, target)
    near = [widths for widths in enough if savings[widths] - target <= NEAR * costs.total]
    others = enough if constraints.at_least else savings
    best = min(near, key=lost) if near else min(others, key=lambda w: (abs(savings[w] - target), lost(w)))
    keep = dict(zip(geometry.axes, best, strict=True))
    cut = {
        (layer_idx, axis): rows["group_idx"].to_numpy()[: max(0, len(rows) - keep[axis])].tolist()
        for (layer_idx, axis), rows in ranked.items()
    }
    return cut, list(savings.values())


def reachable_depth(geometry: Geometry, constraints: ModelConstraints, costs: Costs) -> float:
    """How much whole layers or blocks can save at most, leaving at least one block."""
    units = _units(geometry, constraints, costs)
    blocks = sum(bool(layer[axis]) for layer in geometry.widths for axis in geometry.axes)
    everything = sum(len(unit.axes) for unit in units) == blocks
    # For all we know, the layer that has to stay is the dearest.
    return sum(unit.cost for unit in units) - (max(unit.cost for unit in units) if everything else 0)


def least_depth(geometry: Geometry, constraints: ModelConstraints, costs: Costs) -> float:
    """The least that a whole layer or block saves; 0 where none can go."""
    return min((unit.cost for unit in _units(geometry, constraints, costs)), default=0.0)


def _units(geometry: Geometry, constraints: ModelConstraints, costs: Costs) -> list[Unit]:
    """What may go as a whole: of each layer that may be cut, the blocks of the axes that may be cut.

    Where some groups of an axis have to stay (min-keep), none can. What saves nothing stays.
    """
    units: list[Unit] = []
    if any(constraints.least(axis) for axis in constraints.axes):
        return units
    for layer_idx in constraints.layers(len(geometry.widths)):
        widths = geometry.widths[layer_idx]
        axes = tuple(axis for axis in geometry.axes if axis in constraints.axes and widths[axis])
        cost = sum(costs.saved(layer_idx, axis, widths[axis], 0) for axis in axes)
        if any(costs.group[layer_idx][axis] for axis in axes):
            units.append(Unit(layer_idx, axes, cost))
    return units


def cut_depth(
    table: pd.DataFrame, geometry: Geometry, constraints: ModelConstraints, costs: Costs, target: float
) -> tuple[Cut, list[float]]:
    """Remove whole layers (or blocks), the least important for what they cost first, until the target is met.

    Args:
        table: the global table, at `costs`.
        geometry: shape of the model.
        constraints: what may be cut.
        costs: the quantity.
        target: how much of it is to be saved, at most `reachable_depth`.

    Returns:
        All groups of the blocks that go, and what the first block that could go saves, the first two, and so on.
    """
    sums_of = normalised_importance(table).groupby([table["layer_idx"], table["group_type"]]).sum()
    prices = table["cost"].groupby([table["layer_idx"], table["group_type"]]).sum()

    def score(unit: Unit) -> float:
        keys = [(unit.layer_idx, axis) for axis in unit.axes]
        return float(sum(sums_of[key] for key in keys) / sum(prices[key] for key in keys))

    units = sorted(_units(geometry, constraints, costs), key=lambda unit: (score(unit), unit.layer_idx))
    saved = list(accumulate(unit.cost for unit in units))
    cut = {
        (unit.layer_idx, axis): range(geometry.widths[unit.layer_idx][axis])
        for unit in units[: units_to_cut(saved, target, costs.total, at_least=constraints.at_least)]
        for axis in unit.axes
    }
    return cut, saved


def _saved(costs: Costs, axis: Axis, width: int) -> float:
    """What cutting one axis to `width` groups in every layer saves; layers with fewer stay as they are."""
    layers = ((layer_idx, len(layer[axis]) - 1) for layer_idx, layer in enumerate(costs.blocks))
    return sum(costs.saved(layer_idx, axis, groups, min(width, groups)) for layer_idx, groups in layers)
