"""Writing a file so that a reader never sees a half-written one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A place to write a file at, which takes the place of `path` once the context ends without an error.

    Args:
        path: where the file will be; what is there stays until the last moment.

    Yields:
        `<path>.partial`, in the same folder.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
