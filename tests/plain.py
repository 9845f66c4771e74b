"""Recipes and scores as they are, without what the default recipe adds."""

from __future__ import annotations

from typing import Any

from prunus.pipeline.recipe import Recipe
from prunus.scoring.score import ScoringOptions
from prunus.selection.constraints import Constraints
from prunus.selection.targets import TargetOptions

#: plain first-order Taylor pruning on the command line
PLAIN = ["--recipe", "original"]
#: nothing is measured, and no report made with the texts that both models write for it
UNMEASURED = ["--set", "evaluation.held_out=0", "--set", "output.report=false"]


def plain_scoring(**options: Any) -> ScoringOptions:
    """First-order Taylor scores as they are, or those of another method."""
    return ScoringOptions(**{"method": "taylor", "attention_weight": 1.0, "noise": 0.0, **options})


def plain_recipe(
    scoring: ScoringOptions | None = None,
    selection: Constraints | None = None,
    target: TargetOptions | None = None,
    repair: Any = None,
    rounds: int = 1,
) -> Recipe:
    """Plain slicing in one step, but for what is given."""
    return Recipe(rounds, scoring or plain_scoring(), selection or Constraints(), target or TargetOptions(), repair)
