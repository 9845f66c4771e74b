"""What a model folder says about the trainings that are behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunus.files.json_file import check_content, read_json
from prunus.results.result_content import RecoveryContent

__all__ = ["RECORD", "trainings_in"]

#: file of the folder prunus/ in which training is described
RECORD = "recovery.json"


def trainings_in(folder: Path) -> list[dict[str, Any]]:
    """What each training was, in order; several of one command that cut in rounds, none of a model that had none.

    Args:
        folder: of the model.

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    path = folder / "prunus" / RECORD
    if not path.is_file():
        return []
    last: dict[str, Any] = read_json(path)
    check_content(RecoveryContent, last, str(path))
    about_all = ("earlier", "curve", "rounds")
    own = last.get("rounds") or [{name: last[name] for name in last if name not in about_all}]
    return [*last.get("earlier", ()), *({n: each[n] for n in each if n not in about_all} for each in own)]
