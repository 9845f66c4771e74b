"""Links in a model folder: who made it must not decide which other files of this machine get into a result."""

from __future__ import annotations

import os
from pathlib import Path

from prunus.errors import CheckpointError

__all__ = ["check_inside", "check_links"]


def check_links(folder: Path) -> None:
    """Refuse a folder with links that lead out of it.

    Weights, tokenizer, card, license and what lies in `prunus/` go into results; a link among them could bring any file
    there.

    Raises:
        CheckpointError: a file or folder in it is a link to somewhere else, see `check_inside`.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in (*folders, *names)):
            if path.is_symlink():
                check_inside(folder, path)


def check_inside(folder: Path, path: Path) -> None:
    """Check that a file or folder lies in a model folder, or in the Hub's cache beside it.

    There, `snapshots/<revision>/<file>` is a link to `blobs/<hash>`.

    Args:
        folder: of the model.
        path: need not be there.

    Raises:
        CheckpointError: it is a link to somewhere else, or one of links in a circle.
    """
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    allowed = [home, home.parent.with_name("blobs")] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link that leads out of the folder, to {target}. Put a copy there, if it belongs to the model"
        )
