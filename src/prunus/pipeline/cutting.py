"""From a dense model and its text to a smaller model: score, select, cut and repair, as often as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration
from prunus.calibration.self_text import text_for_repair
from prunus.machine.stages import Stages
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.pipeline.multimodal import recipe_inside
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.rounds import Round, carry_over
from prunus.pipeline.stages import WRITING, cutting, scoring
from prunus.pipeline.work_folder import SELF_TEXT, of_round
from prunus.repair.block_repair import Repair, repair_
from prunus.scoring.score import Score, ScoringOptions, score, seed_of
from prunus.selection.plan import Plan
from prunus.selection.select import select
from prunus.selection.table import with_costs
from prunus.surgery import apply_plan
from prunus.sweep import EngineChoice

__all__ = ["Passes", "Prepared", "PruneResult", "cut", "prepare", "repair_seed", "repair_text"]


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
    """

    batch_size: int = 1
    engine: EngineChoice = "auto"
    work: Path | None = None
    stages: Stages = field(default_factory=lambda: Stages((), progress=False))

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
                progress=self.progress,
                again=step.number > 1,
            )

    def part(self, *names: str) -> Path | None:
        """A part of the work folder, where there is one."""
        return None if self.work is None else self.work.joinpath(*names)


@dataclass(frozen=True)
class Prepared:
    """What several cuts of one model can share.

    Attributes:
        score: the scores of the dense model.
        repair_text: the sequences that repairs are made on; None without a repair.
    """

    score: Score
    repair_text: Calibration | None


def prepare(model: Any, calibration: Calibration | None, ratio: float, recipe: Recipe, passes: Passes) -> Prepared:
    """Score the dense model, and have it write the text of the repairs.

    Args:
        model: the dense model.
        calibration: token sequences, where the recipe needs any.
        ratio: share to remove in the end.
        recipe: how.
        passes: how passes run.
    """
    steps = recipe.steps(ratio)
    scored = passes.score(model, calibration, recipe.scoring, steps[0], len(steps))
    if not recipe.writes_text or layers_of(model).stored:
        return Prepared(scored, repair_text(model, calibration, recipe, progress=passes.progress))
    with passes.stages.enter(WRITING):
        text = repair_text(model, calibration, recipe, work=passes.part(SELF_TEXT), progress=passes.progress)
    return Prepared(scored, text)


def repair_text(
    model: Any, calibration: Calibration | None, recipe: Recipe, *, work: Path | None = None, progress: bool = True
) -> Calibration | None:
    """The sequences that the repairs of a recipe are made on, see `prunus.text_for_repair`; None without a repair."""
    if recipe.repair is None or calibration is None:
        return None
    seed = repair_seed(calibration, recipe)
    return text_for_repair(model, calibration, recipe.repair.self_text, seed=seed, work=work, progress=progress)


def repair_seed(calibration: Calibration | None, recipe: Recipe) -> int:
    """The seed of all that a repair draws: that of the recipe, or the one that the sequences were drawn with."""
    seed = recipe.scoring.random_seed
    return seed_of(calibration) if seed is None else seed


def cut(
    model: Any,
    ratio: float,
    prepared: Prepared,
    recipe: Recipe,
    passes: Passes,
    calibration: Calibration | None,
) -> PruneResult:
    """Select, cut and repair, as often as the recipe says, from scores that are there.

    Args:
        model: the dense model.
        ratio: share to remove in the end.
        prepared: the dense model's scores, and the text of the repairs.
        recipe: how.
        passes: how passes run.
        calibration: what later rounds are scored on.
    """
    recipe = recipe_inside(recipe, model)
    geometry, steps = Geometry.of(model), recipe.steps(ratio)
    costs, text, repairing = recipe.target.costs(geometry), prepared.repair_text, recipe.repair is not None
    pruned, plan, table = model, Plan.keep_all(geometry), with_costs(prepared.score.table, costs)
    repairs: Sequence[Repair] = ()
    for step in steps:
        if step.number > 1:
            part = _first(calibration, step.scored_on)
            rescored = passes.score(pruned, part, recipe.scoring, step, len(steps)).table
            table = carry_over(table, plan, with_costs(rescored, costs.of_layers(plan.surviving_layers)))
        with passes.stages.enter(cutting(step.number, len(steps), repairing)):
            earlier, plan = plan, select(table, geometry, step.share, recipe.selection, costs, last=step.last)
            pruned = apply_plan(pruned, plan.after(earlier, Geometry.of(pruned)))
            sequences = _first(text, step.repaired_on)
            if recipe.repair is not None and sequences is not None:
                repairs = repair_(
                    pruned,
                    model,
                    plan,
                    list(sequences.batches(passes.batch_size)),
                    recipe.repair,
                    seed=repair_seed(calibration, recipe),
                    work=passes.part(of_round(step.number), "repair"),
                    progress=passes.progress,
                )
    findings: dict[str, Any] = {"rounds": len(steps)}
    if text is not None:
        findings["repair_text"] = text.provenance.to_dict()
    scored = replace(prepared.score, table=table, about={**prepared.score.about, **findings})
    return PruneResult(pruned, plan, scored.with_target(recipe.target, plan), repairs)


def _first(calibration: Calibration | None, part: Callable[[int], int]) -> Calibration | None:
    """The first sequences, as many as `part` says of their number."""
    return None if calibration is None else calibration.first(part(len(calibration)))
