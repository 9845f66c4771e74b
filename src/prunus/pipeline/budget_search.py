"""How much of the cut each axis and each part of the depth bears, decided by measuring whole plans.

A ranking compares groups by what each is worth alone. What a layer can lose beside all that goes elsewhere, and how
much of it repair makes up for, no score of a single group says. Here a unit, which is an axis within a band of depth,
gets a factor on its scores, and factors are tried one unit at a time:

    f(u) ← whichever of f(u), f(u) · s, f(u) / s has the lowest L(plan),    score'ᵢ = scoreᵢ · f(unit of i)
    L(plan) = mean token loss of the model that is cut by the plan, and repaired, on sequences the repair has not seen

The step s is 2 in the first round over all units and the square root of the last one's in each further round, until it
is below `SMALLEST_STEP`. The second direction is tried where the first does not help. A plan is measured once.

Source: this is coordinate descent in the space that He et al. 2018, "AMC: AutoML for Model Compression", section 3,
searches by reinforcement learning: how much each layer keeps, rewarded by the accuracy after the cut.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from prunus.calibration import Calibration
from prunus.errors import OptionError
from prunus.evaluation.perplexity import perplexity_of_windows
from prunus.files.records import Records
from prunus.machine.processes import is_first
from prunus.model.digest import digest_batches, digest_model
from prunus.model.families import AXES, Axis
from prunus.model.geometry import Geometry
from prunus.repair.compensation import CompensationOptions, compensate_
from prunus.scoring.weighing import weigh_scores
from prunus.selection.costs import Costs
from prunus.selection.depth_bands import axes_in_bands
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, select
from prunus.surgery import apply_plan

__all__ = ["BudgetSearch", "SearchOptions", "check_search", "search_budget"]

FIRST_STEP, SMALLEST_STEP = 2.0, 1.15
#: a plan has to be better by so much, in nats per token, or it is not worth leaving the ranking for
LEAST_GAIN = 1e-3
#: share of the calibration sequences that trial repairs are made on, and as many again that plans are measured on
PART = 8


@dataclass(frozen=True)
class SearchOptions:
    """How long the budget of axes and depth is searched for.

    Attributes:
        search_trials: measure at most so many plans; with neither limit there is no search, and the ranking decides.
        search_minutes: measure no further plan after so many minutes. The result then depends on the machine.
        search_bands: number of depth bands of about equal size; attention and MLP of each get a factor.
    """

    search_trials: int | None = None
    search_minutes: float | None = None
    search_bands: int = 5

    def __post_init__(self) -> None:
        if self.search_trials is not None and self.search_trials < 2:
            raise OptionError(f"search_trials is {self.search_trials}; comparing takes at least 2 plans")
        if self.search_minutes is not None and not 0 < self.search_minutes < float("inf"):
            raise OptionError(f"search_minutes is {self.search_minutes}; it must be positive and finite")
        if self.search_bands < 1:
            raise OptionError(f"search_bands is {self.search_bands}; it must be at least 1")

    @property
    def wanted(self) -> bool:
        """Whether there is to be a search."""
        return self.search_trials is not None or self.search_minutes is not None


@dataclass(frozen=True)
class BudgetSearch:
    """What a search found.

    Attributes:
        factors: axis → one factor per decoder layer.
        ranking_loss: mean token loss of the plan of the ranking alone, on the sequences that plans are measured on.
        loss: the same of the plan with these factors.
        trials: plans that were measured.
        seconds: spent on them.
    """

    factors: Mapping[Axis, tuple[float, ...]]
    ranking_loss: float
    loss: float
    trials: int
    seconds: float

    def weigh(self, table: pd.DataFrame, layers: tuple[int, ...] | None = None) -> pd.DataFrame:
        """The scores of a table with these factors.

        Args:
            table: a global table, without negative scores.
            layers: indices, in the searched model, of the layers that the table is of; None = all of them.
        """
        chosen = range(len(self.factors[AXES[0]])) if layers is None else layers
        return weigh_scores(table, {axis: [each[i] for i in chosen] for axis, each in self.factors.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_search(options: SearchOptions, sequences: int | None) -> None:
    """Raise unless there are sequences enough to repair on and to measure on.

    Raises:
        OptionError: fewer than two, or none.
    """
    if options.wanted and (sequences is None or sequences < 2):
        raise OptionError(
            f"the budget search has {sequences or 0} calibration sequences; it needs at least 2, to repair plans on "
            "one part and measure them on another"
        )


def search_budget(
    model: Any,
    table: pd.DataFrame,
    ratio: float,
    calibration: Calibration,
    options: SearchOptions,
    *,
    constraints: Constraints | None = None,
    costs: Costs | None = None,
    compensation: CompensationOptions | None = None,
    batch_size: int = 1,
    work: Path | None = None,
    progress: bool = True,
) -> BudgetSearch:
    """Search for factors on the scores of axes and depth bands.

    Args:
        model: the dense model; it stays as it is.
        table: its global table, without negative scores.
        ratio: share of the parameters, or of what `costs` are of, to remove.
        calibration: at least two sequences: one in eight is for trial repairs, and one in eight to measure on. Those of
            the repair, with text of the model's own: a budget found on one kind of text alone is worse on others.
        options: how long.
        constraints: what may be cut.
        costs: the quantity; parameters by default.
        compensation: how plans are repaired before they are measured; None = not at all.
        batch_size: sequences per pass.
        work: folder in which measured plans are kept: a killed search goes on after the last of them.
        progress: show a progress bar on a terminal, and say on stderr what was found.

    Raises:
        OptionError: too few sequences, or negative scores.
        BudgetError: the ratio cannot be reached.
        StatisticsError: `work` holds what was made from other inputs.
    """
    check_search(options, len(calibration))
    geometry = Geometry.of(model)
    measure = _Measure(model, calibration, compensation, batch_size, work)
    units = axes_in_bands(geometry, options.search_bands)
    factors = dict.fromkeys(range(len(units)), 1.0)

    def by_layer(factors: Mapping[int, float]) -> dict[Axis, tuple[float, ...]]:
        each: dict[Axis, list[float]] = {axis: [1.0] * len(geometry.widths) for axis in AXES}
        for number, (axis, layers) in enumerate(units):
            for layer_idx in layers:
                each[axis][layer_idx] = factors[number]
        return {axis: tuple(values) for axis, values in each.items()}

    def loss(factors: Mapping[int, float]) -> float:
        return measure(select(weigh_scores(table, by_layer(factors)), geometry, ratio, constraints, costs))

    def over() -> bool:
        late = options.search_minutes is not None and measure.seconds >= 60 * options.search_minutes
        return late or (options.search_trials is not None and measure.trials >= options.search_trials)

    with tqdm(total=options.search_trials, desc="budget search", disable=None if progress else True) as bar:
        ranking = best = loss(factors)
        step = FIRST_STEP
        while step >= SMALLEST_STEP and not over():
            for number in range(len(units)):
                for move in (step, 1 / step):
                    if over():
                        break
                    tried = {**factors, number: factors[number] * move}
                    found = loss(tried)
                    bar.update(measure.trials - bar.n)
                    bar.set_postfix_str(f"held-out loss {min(best, found):.4f}, of the ranking {ranking:.4f}")
                    if found < best - LEAST_GAIN:
                        factors, best = tried, found
                        break
            step **= 0.5
    result = BudgetSearch(by_layer(factors), ranking, best, measure.trials, round(measure.seconds, 1))
    if progress and is_first():
        changed = [
            f"{axis} of layers {layers.start}-{layers.stop - 1} × {factors[number]:.2f}"
            for number, (axis, layers) in enumerate(units)
            if factors[number] != 1
        ]
        print(
            f"budget search: {measure.trials} plans, held-out loss {ranking:.4f} → {best:.4f}; scores of "
            f"{', '.join(changed) or 'no unit'} changed",
            file=sys.stderr,
        )
    return result


class _Measure:
    """The held-out loss of plans, each measured once."""

    def __init__(
        self,
        model: Any,
        calibration: Calibration,
        compensation: CompensationOptions | None,
        batch_size: int,
        work: Path | None,
    ):
        part = max(1, len(calibration) // PART)
        rest, held_out = calibration.split(part)
        self._model, self._held_out = model, held_out
        # Which channels stay is what the search asks for, and a factor on all logits comes when everything is cut.
        self._compensation = compensation and replace(compensation, reselect=False, fit_logits=False)
        self._batches = list(rest.first(part).batches(batch_size))
        self._records = Records(work, self._made_from(batch_size) if work is not None else None)
        self._known = {self._records.about(number)["plan"]: number for number in range(len(self._records))}
        self._seen: set[str] = set()
        self.seconds = 0.0

    def _made_from(self, batch_size: int) -> dict[str, Any]:
        return {
            "model": digest_model(self._model),
            "calibration tokens": digest_batches([*self._batches, *self._held_out.batches(len(self._held_out))]),
            "sequences per batch": batch_size,
            "compensation": asdict(self._compensation) if self._compensation else None,
            "torch": torch.__version__,
        }

    def _loss_of(self, model: Any) -> float:
        ids, mask = self._held_out.input_ids, self._held_out.attention_mask
        return perplexity_of_windows(model, ids, mask, progress=False).nll

    @property
    def trials(self) -> int:
        """Plans that the search has asked for; one that an earlier run measured counts, too."""
        return len(self._seen)

    def __call__(self, plan: Plan) -> float:
        name = plan.fingerprint
        if name not in self._known:
            start = time.perf_counter()
            smaller = apply_plan(self._model, plan)
            if self._compensation is not None:
                compensate_(smaller, self._model, plan, self._batches, self._compensation, progress=False)
            loss = self._loss_of(smaller)
            self._known[name] = len(self._records)
            self._records.put(
                self._known[name], {}, {"plan": name, "loss": loss, "seconds": time.perf_counter() - start}
            )
        found = self._records.about(self._known[name])
        if name not in self._seen:
            self._seen.add(name)
            self.seconds += found["seconds"]
        return float(found["loss"])
