"""The stages of a job by their names, as lines on stderr, metrics.json and the docs have them."""

from __future__ import annotations

from collections.abc import Sequence

from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import Request

__all__ = [
    "LOADING",
    "MEASURING",
    "SAMPLES",
    "SAVING",
    "WRITING",
    "comparing",
    "cutting",
    "scoring",
    "stages_of",
    "stages_of_job",
    "training",
]

LOADING, WRITING, MEASURING, SAMPLES, SAVING = "loading", "writing text", "measuring", "samples", "saving"


def scoring(number: int, of: int) -> str:
    """The stage that scores groups in one of several rounds."""
    return _in_round("scoring", number, of)


def cutting(number: int, of: int, repairing: bool) -> str:
    """The stage that selects, cuts and repairs in one of several rounds."""
    return _in_round("cut and repair" if repairing else "cut", number, of)


def training(number: int, of: int) -> str:
    """The stage that trains what one of several rounds left."""
    return _in_round("training", number, of)


def stages_of_job(request: Request) -> list[str]:
    """All stages of a job: of one that scores, that prunes and saves, or that compares."""
    texts = [LOADING, *([WRITING] if request.workload.writes_text else [])]
    if not request.ratios:
        return [*texts, scoring(1, 1)]
    if not request.saves:
        return [*texts, *(comparing(seed, request.seeds) for seed in request.seeds)]
    pruning = stages_of(request.recipes[0], request.ratios[0])
    # A streamed model would be read from the disk once for every token.
    shows = request.job.output.report and request.engine == "resident"
    return [*texts, *pruning, MEASURING, *([SAMPLES] if shows else []), SAVING]


def comparing(seed: int, seeds: Sequence[int]) -> str:
    """The stage of a comparison that makes and measures all results of one seed."""
    return "comparing" if len(seeds) == 1 else f"comparing, seed {seed}"


def stages_of(recipe: Recipe, ratio: float) -> list[str]:
    """The stages from a dense model to a smaller one, in order.

    Args:
        recipe: how.
        ratio: share to remove.
    """
    steps = recipe.steps(ratio)
    names = []
    for step in steps:
        names.append(scoring(step.number, len(steps)))
        names.append(cutting(step.number, len(steps), recipe.repair is not None))
        if recipe.recovery:
            names.append(training(step.number, len(steps)))
    return names


def _in_round(name: str, number: int, of: int) -> str:
    return name if of == 1 else f"{name}, round {number} of {of}"
