"""What benchmarks have in common: options of their runs, what is made once for several, and a table of their rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.files.outputs import whole_file

__all__ = ["add_run_options", "made_once", "markdown_table", "named_place", "options_and_words", "write_report"]


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide what is run, and where the rows go."""
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--ratios", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)


def options_and_words(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Options of a benchmark, and as `words` what stands behind `--`: that of a command that it runs."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:cut], argparse.Namespace(words=words[cut + 1 :]))


def named_place(words: str) -> tuple[str, str]:
    """A name, and a file or folder: the type of an option that is given as NAME=PATH."""
    name, equals, path = words.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"write NAME=PATH, not {words!r}")
    return name, path


def write_report(out: Path, report: object) -> None:
    """Write what was measured as JSON, in a folder that need not be there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def made_once(place: Path, by: Sequence[object], make: Callable[[], object]) -> bool:
    """Make a file or folder that later calls use again, and note beside it what it was made by.

    Args:
        place: where it is, complete or not at all.
        by: everything that decides it.
        make: makes it.

    Returns:
        Whether it was made now.

    Raises:
        SystemExit: one is there that was made by something else.
    """
    words, record = [str(word) for word in by], place.with_name(f"{place.name}.made-by.json")
    if place.exists():
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else ["something unknown"]
        if found != words:
            raise SystemExit(f"{place} was made by {' '.join(found)}, not by {' '.join(words)}: remove it, or move it")
        return False
    write_report(record, words)
    make()
    return True


def markdown_table(
    head: Sequence[str], lines: Mapping[tuple[str, ...], Mapping[str, float]], columns: Iterable[str]
) -> str:
    """A table with one line per key, and one figure per column; a figure that is not there leaves its cell empty.

    Args:
        head: names of what the keys consist of.
        lines: key → column → figure.
        columns: names of the columns, in order.
    """
    columns = list(columns)
    table = [[*head, *columns], *([*key, *_cells(found, columns)] for key, found in lines.items())]
    table.insert(1, ["---"] * len(head) + ["---:"] * len(columns))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _cells(found: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{found[column]:,.2f}" if column in found else "" for column in columns]
