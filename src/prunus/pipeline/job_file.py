"""Jobs as YAML files, and every setting as a key: what `--recipe FILE` and `--set KEY=VALUE` read.

    model: smollm2-135m
    ratio: 0.2
    rounds: 2
    scoring:
      method: gate_fisher
    repair: null

A file may give any part; the rest is the default. `job_text` writes every key. How files are read: `prunus.settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prunus.calibration.sources import SOURCES
from prunus.errors import OptionError, PlanError
from prunus.pipeline.job import Job
from prunus.pipeline.recipe import Recipe
from prunus.selection.constraints import ALIGNMENTS
from prunus.selection.latency_profile import LatencyProfile
from prunus.settings import Form, Sheet
from prunus.settings.key import shown

__all__ = ["JOB", "PRESETS", "job_text", "read_job"]

#: recipes with a name of their own
PRESETS: Mapping[str, Callable[[], Recipe]] = {
    "default": Recipe,
    "original": Recipe.original,
    "fast": Recipe.fast,
}


def _read_weights(raw: Any, name: str) -> tuple[tuple[str, float], ...]:
    entries = raw.items() if isinstance(raw, Mapping) else ()
    if not entries or not all(isinstance(word, str) and type(weight) in (int, float) for word, weight in entries):
        raise OptionError(f"{name} is {shown(raw)}; write {{taylor: 0.5, wanda: 0.5}}")
    return tuple((word, float(weight)) for word, weight in entries)


def _read_alignment(raw: Any, name: str) -> int:
    if isinstance(raw, str) and raw in ALIGNMENTS:
        return ALIGNMENTS[raw]
    if isinstance(raw, str) and raw.lstrip("-").isdigit():  # of the command line, where a number is a word as well
        return int(raw)
    if type(raw) is not int:
        choices = ", ".join(ALIGNMENTS)
        raise OptionError(f"{name} is {shown(raw)}; it must be a whole number or one of {choices}")
    return raw


def _read_profile(raw: Any, name: str) -> LatencyProfile:
    if isinstance(raw, str):
        return LatencyProfile.load(raw)
    try:
        return LatencyProfile.from_dict(raw)
    except PlanError as error:
        raise OptionError(f"{name}: {error}") from error


#: the settings of `prunus prune`, `score`, `plan` and `compare`
JOB = Sheet(
    Job(""),
    command="prunus prune",
    listing="prunus recipe",
    example="repair.damping=0.1",
    presets={name: lambda recipe=recipe: Job("", recipe=recipe()) for name, recipe in PRESETS.items()},  # type: ignore[misc]
    forms={
        "calibration.source": SOURCES,
        "recovery.text": SOURCES,
        "scoring.hybrid": Form(_read_weights, dict),
        "selection.align": Form(_read_alignment),
        "target.profile": Form(_read_profile, LatencyProfile.to_dict, "a file of `prunus profile`"),
    },
    at_top=frozenset({"recipe"}),
    left_out=frozenset({"recovery.training.max_steps", "recovery.training.max_minutes"}),
    used={
        "prunus score": ("scoring", "calibration", "run", "output.work"),
        "prunus plan": ("selection", "target"),
        "prunus compare": (
            *("scoring", "selection", "repair", "rounds", "target", "calibration", "evaluation", "run"),
            *("output.report", "output.save_dtype"),
        ),
    },
)

read_job, job_text = JOB.read, JOB.text
