"""Paths as users type them, also where there is no home directory.

A container that runs under a number (`docker run --user 12345`) may have neither $HOME nor an entry in the list of
users; then `~` means nothing, and Python's functions raise RuntimeError.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from prunus.errors import OptionError

__all__ = ["cache_home", "expanded", "home"]


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `~user` replaced by the home directory.

    Raises:
        OptionError: there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(
            f"{str(path)!r} begins with a home directory that is not known here; write the path out"
        ) from error


def home() -> Path | None:
    """The home directory; None where there is none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_home() -> Path:
    """Where programs keep what they can make again: `$XDG_CACHE_HOME`, else `~/.cache`, else a folder for this user."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return expanded(given)
    own = home()
    # The user's number in the name: nobody else's folder is used.
    return own / ".cache" if own else Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
