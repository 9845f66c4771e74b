"""All settings of all commands that read files of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.evaluation.job import EVALUATION
from prunus.pipeline.job_file import JOB
from prunus.recovery.job import RECOVERY
from prunus.settings import Sheet

__all__ = ["SHEETS"]

#: command → its settings
SHEETS: Mapping[str, Sheet[Any]] = {"prune": JOB, "recover": RECOVERY, "eval": EVALUATION}
