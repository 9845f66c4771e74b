"""How near a cut comes to what was asked, where bundles, equal widths or whole layers do not give it exactly.

A cut reaches the share that was asked. Where that would take more than two points too much, the nearest share is taken
that can be had, below as well as above, unless the constraints ask for at least that share; a single group is never too
much. How far off the result is, is said.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np

from prunus.errors import BudgetError
from prunus.selection.constraints import ModelConstraints
from prunus.selection.costs import Costs, amount_of

__all__ = ["NEAR", "check_least", "check_near", "is_too_much", "units_to_cut"]

logger = logging.getLogger(__name__)

#: so far from the share that was asked is as good as there
NEAR = 0.02


def units_to_cut(
    saved: Sequence[float] | np.ndarray,
    target: float,
    total: float,
    single: Sequence[bool] | None = None,
    at_least: bool = False,
) -> int:
    """How many units go, of some that go in this order.

    Args:
        saved: what the first one saves, the first two, and so on.
        target: what is to be saved; all of them do.
        total: of the quantity.
        single: which of them are single groups; None = none.
        at_least: whether the target has to be saved, however much more that is.

    Returns:
        As many as save the target; or one less, where that is nearer and they save too much.
    """
    if target <= 0:
        return 0
    count = min(int(np.searchsorted(saved, target)) + 1, len(saved))
    if at_least or (single is not None and single[count - 1]):
        return count
    before = saved[count - 2] if count > 1 else 0.0
    return count - is_too_much(float(saved[count - 1]), float(before), target, total)


def is_too_much(above: float, below: float, target: float, total: float) -> bool:
    """Whether, of two savings on either side of a target, the one above is farther off, and more than `NEAR`."""
    return above - target > max(NEAR * total, target - below)


def check_least(least: float, ratio: float, constraints: ModelConstraints, costs: Costs) -> None:
    """Raise if keeping everything is nearer to a ratio than any cut.

    Args:
        least: the least that a cut saves.
        ratio: share of the quantity to remove.
        constraints: what may be cut.
        costs: the quantity.

    Raises:
        BudgetError: naming the least that can go.
    """
    if ratio and not constraints.at_least and is_too_much(least, 0.0, amount_of(ratio, costs.total), costs.total):
        raise BudgetError(
            f"{_percent(ratio)} of all {costs.quantity} cannot be removed with {_causes(constraints)}: the least that "
            f"can go is {_percent(_rounded_down(least / costs.total))}, and to keep everything would be nearer. Ask "
            f"for that much, or {_remedies(constraints)}."
        )


def check_near(
    saved: float, possible: Iterable[float], ratio: float, constraints: ModelConstraints, costs: Costs
) -> None:
    """Warn if a cut is more than `NEAR` away from what was asked.

    Args:
        saved: by the cut.
        possible: what cuts of these constraints save, this one and those next to it among them.
        ratio: share of the quantity that was to be removed.
        constraints: what may be cut.
        costs: the quantity.

    Raises:
        BudgetError: nothing is cut, though something was asked for.
    """
    total = costs.total
    if not total or abs(saved / total - ratio) <= NEAR:
        return
    steps = sorted({0.0, *possible})
    if saved <= 0:
        check_least(next(step for step in steps if step > 0), ratio, constraints, costs)
    below, above = ([step for step in steps if (step > amount_of(ratio, total)) == side] for side in (False, True))
    nearest = " and ".join(_percent(_rounded_down(step / total)) for step in (*below[-1:], *above[:1]))
    logger.warning(
        "asked to remove %s of all %s, %s go: with %s the nearest shares are %s. To come nearer, %s.",
        _percent(ratio),
        costs.quantity,
        _percent(_rounded_down(saved / total)),
        _causes(constraints),
        nearest,
        _remedies(constraints),
    )


def _rounded_down(share: float) -> float:
    """A share that gives the same cut when it is asked for as it is written."""
    return math.floor(1000 * share) / 1000


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _causes(constraints: ModelConstraints) -> str:
    """What makes the steps between possible cuts large."""
    causes = [f"shape {constraints.shape}"] if constraints.shape != "ragged" else []
    causes += [f"align {constraints.align}"] if constraints.align > 1 and constraints.shape != "depth" else []
    floors = {axis: constraints.min_keep(axis) for axis in constraints.axes}
    causes += [f"min-keep of {floor} {axis} groups" for axis, floor in floors.items() if floor]
    return ", ".join(causes) or "groups as large as this model's"


def _remedies(constraints: ModelConstraints) -> str:
    remedies = ["choose shape ragged"] if constraints.shape != "ragged" else []
    remedies += ["choose a smaller align"] if constraints.align > 1 and constraints.shape != "depth" else []
    remedies += ["lower min-keep"] if any(constraints.min_keep(axis) for axis in constraints.axes) else []
    return " or ".join(remedies) or "ask for one of those shares"
