"""From a dense model and its text to a smaller model: score, select, cut and repair, as often as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration
from prunus.machine.stages import Stages
from prunus.model.geometry import Geometry
from prunus.pipeline.multimodal import recipe_inside
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.rounds import Round, carry_over
from prunus.pipeline.stages import cutting, scoring, training
from prunus.pipeline.work_folder import of_round
from prunus.repair.block_repair import Repair, repair_
from prunus.scoring.score import Score, ScoringOptions, score, seed_of
from prunus.selection.plan import Plan
from prunus.selection.table import with_costs
from prunus.surgery import apply_plan
from prunus.sweep import EngineChoice

__all__ = ["Passes", "PruneResult", "cut", "first_scores", "repair_seed"]


@dataclass(frozen=True)
class PruneResult:
    """What pruning a live model gives.

    Attributes:
        model: the smaller model.
        plan: which groups were kept.
        score: the global table the plan was chosen from, and what it was made from. After several rounds the groups of
            earlier rounds stand in it as `prunus.pipeline.rounds.carry_over` says.
        repairs: what the repair did to each block in the last round; empty without one.
    """

    model: Any
    plan: Plan
    score: Score
    repairs: Sequence[Repair] = ()

    @property
    def achieved_ratio(self) -> float:
        """Share that was removed, of all parameters or of what the target said."""
        target = self.score.about["target"]
        return float(1 - target["after"] / target["before"]) if target["before"] else 0.0


@dataclass(frozen=True)
class Passes:
    """How sequences go through a model; results depend on it by rounding only.

    Attributes:
        batch_size: sequences per pass.
        engine: see `prunus.score`.
        work: folder from which an interrupted run resumes.
        stages: told which stage begins.
        seed: of all that is random where there are no calibration sequences.
    """

    batch_size: int = 1
    engine: EngineChoice = "auto"
    work: Path | None = None
    stages: Stages = field(default_factory=lambda: Stages((), progress=False))
    seed: int = 0

    @property
    def progress(self) -> bool:
        """Whether to show progress bars on a terminal."""
        return self.stages.progress

    def score(
        self, model: Any, calibration: Calibration | None, options: ScoringOptions, step: Round, of: int
    ) -> Score:
        """Score a model in one of `of` rounds, see `prunus.score`."""
        with self.stages.enter(scoring(step.number, of)):
            return score(
                model,
                calibration,
                options,
                batch_size=self.batch_size,
                engine=self.engine,
                work=self.part(of_round(step.number)),
                seed=self.seed,
                progress=self.progress,
                again=step.number > 1,
            )

    def part(self, *names: str) -> Path | None:
        """A part of the work folder, where there is one."""
        return None if self.work is None else self.work.joinpath(*names)


def first_scores(model: Any, calibration: Calibration | None, ratio: float, recipe: Recipe, passes: Passes) -> Score:
    """Score the dense model.

    Args:
        model: the dense model.
        calibration: token sequences, where the recipe needs any.
        ratio: share to remove in the end.
        recipe: how.
        passes: how passes run.
    """
    steps = recipe.steps(ratio)
    return passes.score(model, calibration, recipe.scoring, steps[0], len(steps))


def repair_seed(calibration: Calibration | None, recipe: Recipe) -> int:
    """The seed of all that a repair draws: that of the recipe, or the one that the sequences were drawn with."""
    seed = recipe.scoring.random_seed
    return seed_of(calibration) if seed is None else seed


def cut(
    model: Any,
    ratio: float,
    scored: Score,
    recipe: Recipe,
    passes: Passes,
    calibration: Calibration | None,
    train: Callable[[Any, Round], Any] | None = None,
) -> PruneResult:
    """Select, cut and repair, as often as the recipe says, from scores that are there.

    Repair brings a model's outputs back to those of the model that was cut: the dense one, or the one that was trained
    after the round before.

    Args:
        model: the dense model.
        ratio: share to remove in the end.
        scored: the dense model's scores.
        recipe: how.
        passes: how passes run.
        calibration: what later rounds are scored on, and all are repaired on.
        train: trains what a round left; it gives the model that goes on. None: nothing is trained.
    """
    recipe = recipe_inside(recipe, model)
    geometry, steps = Geometry.of(model), recipe.steps(ratio)
    costs, repairing = recipe.target.costs(geometry), recipe.repair is not None
    pruned, plan, table = model, Plan.keep_all(geometry), with_costs(scored.table, costs)
    whole, whole_plan = model, plan
    repairs: Sequence[Repair] = ()
    for step in steps:
        if step.number > 1:
            part = _first(calibration, step.scored_on)
            rescored = passes.score(pruned, part, recipe.scoring, step, len(steps)).table
            table = carry_over(table, plan, with_costs(rescored, costs.of_layers(plan.surviving_layers)))
        with passes.stages.enter(cutting(step.number, len(steps), repairing)):
            ranked = replace(scored, table=table)
            earlier, plan = plan, ranked.plan(step.share, recipe.selection, costs, last=step.last)
            pruned = apply_plan(pruned, plan.after(earlier, Geometry.of(pruned)))
            sequences = _first(calibration, step.repaired_on)
            if recipe.repair is not None and sequences is not None:
                repairs = repair_(
                    pruned,
                    whole,
                    plan.after(whole_plan, Geometry.of(whole)),
                    list(sequences.batches(passes.batch_size)),
                    recipe.repair,
                    seed=repair_seed(calibration, recipe),
                    work=passes.part(of_round(step.number), "repair"),
                    progress=passes.progress,
                )
                behind = whole_plan.surviving_layers
                repairs = [replace(repair, layer_idx=behind[repair.layer_idx]) for repair in repairs]
        if train is not None:
            with passes.stages.enter(training(step.number, len(steps))):
                pruned = train(pruned, step)
            whole, whole_plan = pruned, plan
    scored = replace(scored, table=table, about={**scored.about, "rounds": len(steps)})
    return PruneResult(pruned, plan, scored.with_target(recipe.target, plan), repairs)


def _first(calibration: Calibration | None, part: Callable[[int], int]) -> Calibration | None:
    """The first sequences, as many as `part` says of their number."""
    return None if calibration is None else calibration.first(part(len(calibration)))
