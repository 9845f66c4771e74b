"""JSON files of models and results, read with an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunus.errors import CheckpointError

__all__ = ["read_json", "read_json_if_whole"]


def read_json(path: Path, kind: type[dict] | type[list] = dict) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        kind: what it holds: dict for an object, list for an array.

    Raises:
        CheckpointError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise CheckpointError(
            f"{path} does not hold a JSON {'array' if kind is list else 'object'}, but a {type(content).__name__}"
        )
    return content


def read_json_if_whole(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or another or half an object in it."""
    try:
        content: dict[str, Any] = read_json(path)
    except CheckpointError:
        return None
    return content
