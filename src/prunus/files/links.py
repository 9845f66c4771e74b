"""Links in a model folder: who made it must not decide which other files of this machine get into a result."""

from __future__ import annotations

import os
from pathlib import Path

from prunus.errors import CheckpointError

__all__ = ["check_links"]

#: weights are read as such or not at all, and people link to large files
MAY_BE_ANYWHERE = (".safetensors",)


def check_links(folder: Path) -> None:
    """Refuse a folder with links that lead out of it.

    Tokenizer, card, license and what lies in `prunus/` go into results; a link among them could bring any file there.
    Links of the Hub's cache are as they should be: `snapshots/<revision>/<file>` leads to `blobs/<hash>` beside it.

    Raises:
        CheckpointError: a file or folder in it is a link to somewhere else.
    """
    own = folder.resolve()
    allowed = [own]
    if own.parent.name == "snapshots":
        allowed.append(own.parent.with_name("blobs"))
    for place, folders, names in os.walk(own):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in (*folders, *names)):
            if not path.is_symlink() or path.suffix in MAY_BE_ANYWHERE:
                continue
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in allowed):
                raise CheckpointError(
                    f"{folder / path.relative_to(own)} is a link that leads out of the folder, to {target}: what it "
                    "shows would get into the result. Put a copy of the file there, if it belongs to the model"
                )
