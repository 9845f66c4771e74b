"""A recipe: everything that decides what a model becomes, except the text and how much is removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from prunus.errors import CalibrationError
from prunus.model.geometry import Geometry
from prunus.pipeline.recovery_rounds import RecoveryRounds
from prunus.pipeline.rounds import Round, schedule
from prunus.repair.block_repair import RepairOptions
from prunus.scoring.adaptive import check_enough
from prunus.scoring.score import ScoringOptions
from prunus.selection.select import Constraints, check_ratio
from prunus.selection.targets import TargetOptions

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned. `Recipe()` is the default recipe, chosen by measurement (benchmarks/RESULTS.md).

    Attributes:
        rounds: number of prune–repair steps of equal size, with re-scoring in between; shape uniform always takes one
            step.
        scoring: how groups are ranked.
        selection: which groups may be cut, and in what form.
        target: what the ratio is a share of.
        repair: how the remaining weights are repaired; none = plain slicing.
        recovery: training after each round.
    """

    rounds: int = 2
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    selection: Constraints = field(default_factory=Constraints)
    target: TargetOptions = field(default_factory=TargetOptions)
    repair: RepairOptions | None = field(default_factory=RepairOptions)
    recovery: RecoveryRounds = field(default_factory=RecoveryRounds)

    def __post_init__(self) -> None:
        schedule(0.0, self.rounds)

    @classmethod
    def original(cls, method: str = "taylor") -> Self:
        """Plain slicing in one step by the scores of a method as they are, as the original scripts do it."""
        return cls(1, ScoringOptions(method=method, attention_weight=1.0, noise=0.0), repair=None)

    @classmethod
    def fast(cls) -> Self:
        """The default recipe in one step: about half of the time."""
        return cls(1)

    @property
    def needs_calibration(self) -> bool:
        """Whether any part needs calibration sequences."""
        return self.scoring.needs_calibration or self.repair is not None

    def of(self, geometry: Geometry) -> Self:
        """The same for a model, with axes and shape decided, see `Constraints.of`.

        Raises:
            OptionError: they do not fit the model, or the method says nothing about an axis that is to be cut.
        """
        selection = self.selection.of(geometry)
        costs = self.target.costs(geometry)
        cut = [axis for axis in selection.axes if any(layer.get(axis) for layer in costs.group)]
        self.scoring.check_axes(geometry, cut)
        return replace(self, selection=selection)

    def by(self, method: str) -> Self:
        """The same with another importance method."""
        return replace(self, scoring=replace(self.scoring, method=method))

    def steps(self, ratio: float) -> Sequence[Round]:
        """The rounds that remove `ratio` in the end.

        A uniform cut takes one: a later one could choose more attention groups than an earlier one left.
        """
        return schedule(ratio, 1 if self.selection.shape == "uniform" else self.rounds)

    def check(self, ratio: float, *, sequences: int | None, scored: bool = False) -> None:
        """Check it against a ratio and a number of sequences, without a model.

        Args:
            ratio: share of all parameters, or of what the target says, to remove.
            sequences: number of calibration sequences; None where there are none.
            scored: whether the scores of the first round are there already.

        Raises:
            OptionError: a ratio outside [0, 1), or too few sequences for the method.
            CalibrationError: something needs calibration sequences, and there are none.
        """
        check_ratio(ratio, self.target.quantity)
        if self.repair is not None and sequences is None:
            raise CalibrationError("repair needs calibration sequences; give some, or use a recipe without repair")
        method = self.scoring.method
        for step in self.steps(ratio)[int(scored) :]:
            if self.scoring.needs_calibration and sequences is None:
                raise CalibrationError(f"method {method} needs calibration sequences; give a calibration source")
            if method == "adaptive" and sequences is not None:
                later = f" in round {step.number}, which scores on a part of the {sequences}"
                check_enough(step.scored_on(sequences), later if step.number > 1 else "")
