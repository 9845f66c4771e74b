"""Where a model folder comes from: the original model, and the whole cut that leads from there to it.

A model may be pruned again and again. Each result keeps the plan of its own step in `prunus/plan.json`, relative to the
folder it was made from. From the second step on `prunus/plan_from_original.json` holds all steps as one plan for the
model that was never cut, and `metrics.json` names that model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunus.errors import CheckpointError, PrunusError
from prunus.files.json_file import check_content, read_json
from prunus.results.result_content import MetricsContent
from prunus.selection.plan import Plan

__all__ = ["COMPOSED_PLAN", "Lineage", "lineage_of", "plan_from_original"]

#: in the folder prunus/ of a model that was pruned more than once
COMPOSED_PLAN = "plan_from_original.json"


@dataclass(frozen=True)
class Lineage:
    """What a folder that prunus wrote says of its origin.

    Attributes:
        model: the original model, a Hub id or the name of its folder.
        parameters: of the original model, tied ones counted once.
        plan: the whole cut, from the original model to the folder's.
        active_parameters: of the original model, those that work on each token; None where all do.
    """

    model: str
    parameters: int
    plan: Plan
    active_parameters: int | None = None

    def then(self, plan: Plan) -> Lineage:
        """The origin of a model that is cut once more.

        Args:
            plan: for the model that this cut leaves.

        Raises:
            PlanError: it is for another model.
        """
        return replace(self, plan=self.plan.compose(plan))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for metrics.json; the plan by its fingerprint."""
        active = {} if self.active_parameters is None else {"active_parameters": self.active_parameters}
        return {"model": self.model, "parameters": self.parameters, **active, "plan": self.plan.fingerprint}


def plan_from_original(folder: Path) -> Path | None:
    """The file with the whole cut of a folder, whether it was pruned once or more often; None if it has none."""
    return next((path for name in (COMPOSED_PLAN, "plan.json") if (path := folder / "prunus" / name).is_file()), None)


def lineage_of(folder: Path) -> Lineage | None:
    """Read the origin of a model folder.

    Args:
        folder: a model folder, pruned or not.

    Returns:
        None for a folder without a plan.

    Raises:
        CheckpointError: there is a plan, but the records with it cannot be read.
    """
    path = plan_from_original(folder)
    if path is None:
        return None
    metrics_path = path.with_name("metrics.json")
    try:
        metrics = check_content(MetricsContent, read_json(metrics_path), str(metrics_path))
        plan = Plan.load(path)
        if metrics.original is not None:
            original = metrics.original
            return Lineage(original.model, original.parameters, plan, original.active_parameters)
        return Lineage(metrics.base_model, metrics.parameters_before, plan, metrics.active_parameters_before)
    except PrunusError as error:
        raise CheckpointError(
            f"{folder} was pruned before, but its records cannot be read ({error}): bring {metrics_path.name} and "
            f"{path.name} in {path.parent} back, or remove that folder to cut the model as if it had never been cut"
        ) from error
