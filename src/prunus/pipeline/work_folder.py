"""The folder beside an output in which a long job keeps what a killed run would need to go on."""

from __future__ import annotations

import shutil
from pathlib import Path

from prunus.errors import OptionError
from prunus.files.user_path import expanded
from prunus.sweep import Engine

__all__ = ["ROWS", "WorkFolder", "of_round"]

ROUND = "round-{}"
#: the part of the rows that a comparison has measured
ROWS = "rows"
#: what prunus puts there, and takes away again; the last two are of the sweep and of an opened model
CONTENTS = (ROUND.format("*"), ROWS, "statistics-*", "prunus-layers-*")


def of_round(number: int) -> str:
    """The part of one round: its statistics, and the blocks that were repaired."""
    return ROUND.format(number)


class WorkFolder:
    """Where the work of one command lies.

    Args:
        out: the command's output.
        asked: the folder that the user names; None for `<out>.work`, which the streamed engine, training within a cut
            and comparisons use.

    Raises:
        OptionError: the folder is a file, or holds what prunus did not put there: it removes its work at the end.
    """

    def __init__(self, out: str | Path, asked: str | Path | None = None):
        self._asked = asked is not None
        try:
            out = expanded(out)
            self.path = out.with_name(out.name + ".work") if asked is None else expanded(asked)
            is_file = self.path.exists() and not self.path.is_dir()
            found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        except (OSError, RuntimeError, ValueError) as error:  # too long, nobody's home, no name
            raise OptionError(f"a work folder for {str(asked or out)!r} cannot be created: {error}") from error
        if is_file:
            raise OptionError(f"work folder {self.path} is a file; remove it, or name a folder with `work`")
        if foreign := [entry for entry in found if entry.is_symlink() or not any(map(entry.match, CONTENTS))]:
            raise OptionError(
                f"work folder {self.path} holds {foreign[0].name}, which prunus did not put there; name a new folder "
                "with `work`"
            )

    def used_by(self, engine: Engine) -> Path | None:
        """The folder, if there is one to be used under an engine."""
        return self.path if self._asked or engine == "streamed" else None

    def remove(self) -> None:
        """Take away what prunus put there, and the folder if nothing else is in it."""
        for pattern in CONTENTS:
            for entry in self.path.glob(pattern):
                shutil.rmtree(entry, ignore_errors=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
