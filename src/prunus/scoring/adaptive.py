"""The adaptive method: which importance each kind of group is ranked by, and on what scale, decided by measuring.

Methods rank groups of one axis well or badly, and put the two axes on scales of their own. Here the model itself is
asked. Per axis:

1. every candidate method cuts a quarter of the axis' parameters, and the rise of the loss is measured on calibration
   sequences that the methods have not seen; the candidate with the smallest rise ranks the axis;
2. the rise D(c) is measured at further shares c, and the importances between two shares are scaled to sum to the rise
   between them. A score then is a loss per parameter, measured alike in both axes:

    importance'ᵢ = importanceᵢ · (D(c_k) − D(c_{k−1})) / Σ importance of the groups between c_{k−1} and c_k

Scores never fall along an axis' ranking. Groups beyond the last share keep the last scale.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from prunus.calibration import Calibration
from prunus.errors import OptionError
from prunus.machine.processes import is_first
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.selection.constraints import Constraints
from prunus.selection.select import select
from prunus.selection.table import rank_table
from prunus.surgery import apply_plan
from prunus.sweep.sequence_loss import perplexity_of_windows

__all__ = ["AdaptiveOptions", "adapt", "check_enough", "split_probe"]

#: share of an axis' parameters at which candidates are compared, and the shares at which the winner is measured
PROBE_SHARE = 0.25
SCALE_SHARES = (0.125, 0.25, 0.5)
#: with fewer sequences there is too little to hold out of
FEWEST_SEQUENCES = 8


@dataclass(frozen=True)
class AdaptiveOptions:
    """What the adaptive method chooses from.

    Attributes:
        candidates: importance methods that compete for each axis.
    """

    candidates: tuple[str, ...] = ("taylor", "gate_fisher", "wanda")

    def __post_init__(self) -> None:
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise OptionError(f"`candidates` are {', '.join(self.candidates) or 'none'}; name each method once")


def check_enough(sequences: int, where: str = "") -> None:
    """Raise if there are too few sequences to hold some out.

    Args:
        sequences: how many there are.
        where: what an error says about that number, after it.

    Raises:
        OptionError: fewer than eight.
    """
    if sequences < FEWEST_SEQUENCES:
        raise OptionError(
            f"the adaptive method has {sequences} calibration sequences{where}; it needs at least {FEWEST_SEQUENCES}, "
            "to hold some out"
        )


def split_probe(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Part the sequences that methods see from those that probes are measured on: one in eight, four at least.

    Raises:
        OptionError: fewer than eight sequences.
    """
    check_enough(len(calibration))
    return calibration.split(max(4, len(calibration) // 8))


def adapt(
    model: Any,
    tables: Mapping[str, pd.DataFrame],
    probe: Calibration,
    options: AdaptiveOptions,
    *,
    progress: bool = True,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Choose a method for each axis and scale its scores to measured losses.

    Args:
        model: the model that the tables are of; it stays as it is.
        tables: the global table of every candidate, with scores that are comparable across layers.
        probe: calibration sequences that the tables were not made from.
        options: the candidates.
        progress: show progress bars on a terminal, and say on stderr what was chosen and why.

    Returns:
        The global table, and one record per axis: the loss rise of each candidate at `PROBE_SHARE`, the
        method chosen, and its loss rise at each of `SCALE_SHARES`.
    """
    geometry = Geometry.of(model)

    def loss(candidate: Any) -> float:
        return perplexity_of_windows(candidate, probe.input_ids, probe.attention_mask, progress=progress).nll

    dense = loss(model)
    parts, records = [], []
    for axis in (axis for axis in AXES if any(widths[axis] for widths in geometry.widths)):
        constraints = Constraints(axes=(axis,))
        axis_cost = sum(widths[axis] for widths in geometry.widths) * geometry.group_parameters[axis]

        def rise(name: str, share: float, constraints: Constraints = constraints, cost: int = axis_cost) -> float:
            plan = select(tables[name], geometry, share * cost / geometry.total_parameters, constraints, last=False)
            return loss(apply_plan(model, plan)) - dense

        rises = {name: rise(name, PROBE_SHARE) for name in options.candidates}
        chosen = min(rises, key=lambda name: rises[name])
        curve = [rises[chosen] if share == PROBE_SHARE else rise(chosen, share) for share in SCALE_SHARES]
        table = tables[chosen]
        rows = table[table["group_type"] == axis]
        parts.append(_scaled(rows, curve))
        record = {
            "axis": axis,
            "loss_rise": rises,
            "method": chosen,
            "curve": dict(zip(map(str, SCALE_SHARES), curve, strict=True)),
        }
        records.append(record)
        if progress and is_first():
            each = ", ".join(f"{name} {value:.4f}" for name, value in rises.items())
            print(
                f"{axis}: chose {chosen}; removing a quarter by each method raises the held-out loss by {each}",
                file=sys.stderr,
            )
    return rank_table(pd.concat(parts, ignore_index=True)), records


def _scaled(rows: pd.DataFrame, curve: Sequence[float]) -> pd.DataFrame:
    """The rows of an axis, ranked, with importances that add up to the measured rises of the loss."""
    values = (rows["score"] * rows["cost"]).to_numpy(dtype=float)
    values = values - min(values.min(), 0.0)
    share = rows["cost"].cumsum().to_numpy() / rows["cost"].sum()
    # A loss that falls when more is cut is noise: no segment may be worth less than nothing.
    rises = np.maximum.accumulate([0.0, *curve])
    importance = np.zeros(len(rows))
    factor, start = 1.0, 0
    for number, level in enumerate(SCALE_SHARES):
        stop = int(np.searchsorted(share, level)) + 1
        total = values[start:stop].sum()
        if stop > start and total > 0:
            factor = (rises[number + 1] - rises[number]) / total
            importance[start:stop] = values[start:stop] * factor
            start = stop
    importance[start:] = values[start:] * factor
    scores = np.maximum.accumulate(importance / rows["cost"].to_numpy())
    return rows.assign(importance=scores * rows["cost"])
