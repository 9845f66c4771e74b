"""`prunus report`: the page about a result."""

from __future__ import annotations

from pathlib import Path

from prunus.cli.flags import Flag

__all__ = ["report"]


def report(folder: Path, /, *, out: Path | None = None, overwrite: Flag = False, json: Flag = False) -> None:
    """Write one self-contained HTML page about a result of `prune`, `apply` or `compare`.

    Args:
        folder: what prunus wrote.
        out: the file to write; by default report.html in the folder.
        overwrite: replace an earlier report.
        json: print its path as JSON.
    """
    from prunus.cli.printing import print_json
    from prunus.cli.terminal import say
    from prunus.report import write_report

    path = write_report(folder, out, overwrite=overwrite)
    if json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        say(path)
