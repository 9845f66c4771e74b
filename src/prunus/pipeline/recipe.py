"""A way of pruning, and whether its parts go together, which is asked before any of them takes time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from prunus.errors import CalibrationError, OptionError, StatisticsError
from prunus.pipeline.budget_search import SearchOptions, check_search
from prunus.pipeline.rounds import schedule
from prunus.repair.compensation import CompensationOptions
from prunus.repair.reselection import CHOSEN_BY
from prunus.scoring.adaptive import check_enough
from prunus.scoring.score import Score, ScoringOptions
from prunus.selection.select import Constraints, check_ratio
from prunus.selection.targets import TargetOptions

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """All that decides what a model becomes, but for the text and how much is removed.

    Attributes:
        scoring: method and its options.
        constraints: what may be cut; None = everything.
        target: what the ratio is a share of.
        compensation: repair; None = plain slicing.
        rounds: how often to cut.
        search: for the budget of axes and depth.
    """

    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    constraints: Constraints | None = None
    target: TargetOptions = field(default_factory=TargetOptions)
    compensation: CompensationOptions | None = None
    rounds: int = 1
    search: SearchOptions = field(default_factory=SearchOptions)

    @classmethod
    def of(
        cls,
        scoring: ScoringOptions | None,
        constraints: Constraints | None,
        target: TargetOptions | None,
        compensation: CompensationOptions | None,
        rounds: int,
        search: SearchOptions | None = None,
    ) -> Self:
        """A recipe of what a caller gave, where None is the default."""
        return cls(
            scoring or ScoringOptions(),
            constraints,
            target or TargetOptions(),
            compensation,
            rounds,
            search or SearchOptions(),
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether any part needs calibration sequences."""
        return self.scoring.needs_calibration or self.compensation is not None or self.search.wanted

    @property
    def reselects(self) -> bool:
        """Whether the repair chooses the channels of a layer."""
        return self.compensation is not None and self.compensation.reselect

    @property
    def writes_text(self) -> bool:
        """Whether the model writes text for its repair."""
        return self.compensation is not None and self.compensation.self_text > 0

    def by(self, method: str) -> Self:
        """The same with another importance method."""
        return replace(self, scoring=replace(self.scoring, method=method))

    def check(self, ratio: float, *, sequences: int | None, scored: Score | None = None) -> None:
        """Check it by itself, without a model.

        Args:
            ratio: share of all parameters, or of what the target says, to remove.
            sequences: number of calibration sequences; None where there are none.
            scored: the scores of the first round, where they are there already.

        Raises:
            OptionError: a value that cannot work, two options that exclude each other, or too few sequences for the
                method.
            CalibrationError: something needs calibration sequences, and there are none.
            StatisticsError: `scored` lacks what the repair chooses channels by.
        """
        check_ratio(ratio, self.target.quantity)
        self._check_rounds(ratio)
        self._check_search(sequences)
        self._check_repair(sequences, scored)
        self._check_sequences(ratio, sequences, scored)

    def _check_rounds(self, ratio: float) -> None:
        schedule(ratio, self.rounds)
        if self.rounds > 1 and self.constraints is not None and self.constraints.shape == "uniform":
            raise OptionError(
                "shape uniform goes with one round: a later one could choose more attention groups than an earlier one "
                "left"
            )

    def _check_search(self, sequences: int | None) -> None:
        check_search(self.search, sequences)
        if self.search.wanted and self.scoring.normalize == "zscore":
            raise OptionError(
                "the budget search multiplies scores, and zscore makes some negative: choose another normalisation"
            )

    def _check_repair(self, sequences: int | None, scored: Score | None) -> None:
        if self.compensation is not None and sequences is None:
            raise CalibrationError("compensation needs calibration sequences; give some, or leave compensation out")
        if not self.reselects:
            return
        if not self.scoring.takes_gradients:
            raise OptionError(
                f"reselect needs gradients, which method {self.scoring.method} does not take; choose another method, "
                "or leave reselect out"
            )
        if scored is not None and (scored.statistics is None or not scored.statistics.has(CHOSEN_BY)):
            raise StatisticsError(
                f"reselect needs the statistic {CHOSEN_BY} of every layer, which the given scores lack; score with "
                "curvature=True, or leave reselect out"
            )

    def _check_sequences(self, ratio: float, sequences: int | None, scored: Score | None) -> None:
        """Whether each round has what its scores are taken on."""
        method = self.scoring.method
        for step in schedule(ratio, self.rounds):
            if step.number == 1 and scored is not None:
                continue
            if self.scoring.needs_calibration and sequences is None:
                raise CalibrationError(f"method {method} needs calibration sequences; give a calibration source")
            if method == "adaptive" and sequences is not None:
                later = f" in round {step.number}, which scores on a part of the {sequences}"
                check_enough(step.scored_on(sequences), later if step.number > 1 else "")
