"""The rows of a comparison, each kept as soon as it is measured, so that a run that was stopped goes on after them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from prunus.errors import CheckpointError, OptionError, PlanError
from prunus.files.json_file import Count, FileContent, Number, check_content, read_json
from prunus.files.outputs import whole_file
from prunus.pipeline.inputs import Inputs
from prunus.pipeline.work_folder import ROWS
from prunus.results.comparison import DENSE, plan_name
from prunus.selection.plan import Plan

__all__ = ["ComparisonRecord", "Row"]

COLUMNS = ("recipe", "ratio", "seed", "parameters", "perplexity", "relative", "seconds", "peak_bytes")


@dataclass(frozen=True)
class Row:
    """What a measurement is of.

    Attributes:
        recipe: its name, or `DENSE`.
        ratio: share that was to be removed.
        seed: of the calibration sequences.
        seconds: of all that led to the result.
        peak_bytes: the most memory that any of it took.
    """

    recipe: str
    ratio: float
    seed: int
    seconds: float | None = None
    peak_bytes: int | None = None


class _RowContent(FileContent):
    recipe: str
    ratio: Number
    seed: int
    parameters: Count
    perplexity: Number
    seconds: Number | None
    peak_bytes: Count | None


class _Kept(FileContent):
    row: _RowContent
    plan: dict[str, Any] | None
    protocol: dict[str, str]


class ComparisonRecord:
    """The rows that are measured.

    Args:
        work: the comparison's work folder. A row in it counts only if it was made from what is given now, down to the
            hashes of weights and texts.
        recipes: by name, as plain values.
    """

    def __init__(self, work: Path, recipes: Mapping[str, Any]):
        self._folder = work / ROWS
        self._recipes = {DENSE: None, **recipes}
        self._facts = ""
        self._rows: list[dict[str, Any]] = []
        self._plans: dict[str, Plan] = {}
        self._protocol: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def go_on(self, facts: Mapping[str, Any], seed: int, ratios: Iterable[float]) -> None:
        """Begin with a drawing of the calibration sequences, and read the rows of it that are kept.

        Args:
            facts: all that its rows depend on beside their recipe and ratio, as plain values.
            seed: that the sequences were drawn with.
            ratios: of the comparison.

        Raises:
            OptionError: a kept row cannot be read.
        """
        self._facts = _digest(facts)
        wanted = [Row(DENSE, 0.0, seed)]
        wanted += [Row(name, ratio, seed) for name in self._recipes if name != DENSE for ratio in ratios]
        for path in filter(Path.is_file, map(self._path, wanted)):
            try:
                kept = check_content(_Kept, read_json(path), str(path), CheckpointError)
                plan = Plan.from_dict(kept.plan) if kept.plan is not None else None
            except (CheckpointError, PlanError) as error:
                raise OptionError(f"{error}; remove {path}, and it is measured again") from error
            self._take(kept.row.model_dump(), plan, kept.protocol)

    def __contains__(self, row: Row) -> bool:
        known = {(each["recipe"], each["ratio"], each["seed"]) for each in self._rows}
        return (row.recipe, row.ratio, row.seed) in known

    def add(self, inputs: Inputs, model: Any, rows: Sequence[Row], plan: Plan | None = None, *, progress: bool) -> None:
        """Measure a model once, and keep the rows that it is the result of.

        Args:
            inputs: what it is measured on.
            model: the model.
            rows: what it is the result of.
            plan: what it kept; None for the dense model.
            progress: show progress bars on a terminal.
        """
        result, _ = inputs.measure(model, progress=progress)
        assert result is not None
        accuracies = inputs.accuracies(model)
        protocol = {"text": inputs.text_name, "protocol": result.protocol}
        self._folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            seconds = None if row.seconds is None else round(row.seconds, 1)
            measured = {"parameters": model.num_parameters(), "perplexity": result.perplexity, **accuracies}
            values = {**asdict(row), "seconds": seconds, **measured}
            kept = {"row": values, "plan": plan.to_dict() if plan else None, "protocol": protocol}
            if math.isfinite(result.perplexity):  # JSON has no other numbers; such a row is measured again
                with whole_file(self._path(row)) as partial:
                    partial.write_text(json.dumps(kept), encoding="utf-8")
            self._take(values, plan, protocol)

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write comparison.csv, comparison.json and the plans.

        Args:
            folder: for them.
            about: what else comparison.json says.
        """
        (folder / "plans").mkdir(parents=True)
        for name, plan in self._plans.items():
            plan.save(folder / "plans" / name)
        self.frame.to_csv(folder / "comparison.csv", index=False)
        about = {**about, "evaluation": self._protocol, "rows": json.loads(self.frame.to_json(orient="records"))}
        (folder / "comparison.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @property
    def frame(self) -> pd.DataFrame:
        """One row per result, by seed, recipe as they were given, and ratio; the dense model first."""
        order = {name: number for number, name in enumerate(self._recipes)}
        rows = sorted(self._rows, key=lambda row: (row["seed"], order[row["recipe"]], row["ratio"]))
        frame = pd.DataFrame(rows)
        dense = {row["seed"]: row["perplexity"] for row in rows if row["recipe"] == DENSE}
        frame["relative"] = frame["perplexity"] / frame["seed"].map(dense)
        return frame[[*COLUMNS, *(column for column in frame.columns if column not in COLUMNS)]]

    def _take(self, row: dict[str, Any], plan: Plan | None, protocol: dict[str, str]) -> None:
        self._rows.append(row)
        self._protocol = protocol
        if plan is not None:
            self._plans[plan_name(row["recipe"], row["ratio"], row["seed"])] = plan

    def _path(self, row: Row) -> Path:
        """The file of a row, named after all that it depends on."""
        made_from = {"recipe": self._recipes[row.recipe], "name": row.recipe, "ratio": row.ratio, "seed": row.seed}
        return self._folder / f"{_digest({**made_from, 'facts': self._facts})}.json"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
