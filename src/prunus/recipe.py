"""Whether the parts of a way of pruning go together, asked before any of them takes time."""

from __future__ import annotations

from prunus.adaptive import check_enough
from prunus.budget_search import SearchOptions, check_search
from prunus.compensation import CompensationOptions
from prunus.errors import CalibrationError, OptionError, StatisticsError
from prunus.reselection import CHOSEN_BY
from prunus.rounds import schedule
from prunus.scoring import Score, ScoringOptions
from prunus.selection import Constraints, check_ratio
from prunus.targets import TargetOptions

__all__ = ["check_recipe"]


def check_recipe(
    ratio: float,
    scoring: ScoringOptions,
    constraints: Constraints | None,
    compensation: CompensationOptions | None,
    rounds: int,
    search: SearchOptions | None = None,
    *,
    sequences: int | None,
    target: TargetOptions | None = None,
    scored: Score | None = None,
) -> None:
    """Check a recipe by itself, without a model.

    Args:
        ratio: share of all parameters, or of what `target` says, to remove.
        scoring: method and its options.
        constraints: what may be cut.
        compensation: repair; None = plain slicing.
        rounds: how often to cut.
        search: for the budget of axes and depth; default: none.
        sequences: number of calibration sequences; None where there are none.
        target: what the ratio is a share of; default: parameters.
        scored: the scores of the first round, where they are there already.

    Raises:
        OptionError: a value that cannot work, two options that exclude each other, or too few sequences for the method.
        CalibrationError: something needs calibration sequences, and there are none.
        StatisticsError: `scored` lacks what the repair chooses channels by.
    """
    check_ratio(ratio, (target or TargetOptions()).quantity)
    steps = schedule(ratio, rounds)
    if rounds > 1 and constraints is not None and constraints.shape == "uniform":
        raise OptionError(
            "shape uniform goes with one round: a later one could choose more attention groups than an earlier one left"
        )
    if search is not None and search.wanted:
        check_search(search, sequences)
        if scoring.normalize == "zscore":
            raise OptionError(
                "the budget search multiplies scores, and zscore makes some negative: choose another normalisation"
            )
    if compensation is not None and sequences is None:
        raise CalibrationError("compensation needs calibration sequences; give some, or leave compensation out")
    if compensation is not None and compensation.reselect:
        if not scoring.takes_gradients:
            raise OptionError(
                f"reselect needs gradients, which method {scoring.method} does not take; choose another method, or "
                "leave reselect out"
            )
        if scored is not None and (scored.statistics is None or not scored.statistics.has(CHOSEN_BY)):
            raise StatisticsError(
                f"reselect needs the statistic {CHOSEN_BY} of every layer, which the given scores lack; score with "
                "curvature=True, or leave reselect out"
            )
    for step in steps:
        if step.number == 1 and scored is not None:
            continue
        if scoring.needs_calibration and sequences is None:
            raise CalibrationError(f"method {scoring.method} needs calibration sequences; give a calibration source")
        if scoring.method == "adaptive" and sequences is not None:
            later = f" in round {step.number}, which scores on a part of the {sequences}"
            check_enough(step.scored_on(sequences), later if step.number > 1 else "")
