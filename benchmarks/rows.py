"""What benchmarks of recipes have in common: options of their runs, and a table of their rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prunus.checkpoint.packaged_model import PACKAGED_MODEL

__all__ = ["add_run_options", "markdown_table", "named_place", "options_and_words", "write_report"]


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


def write_report(out: Path, report: Mapping[str, object]) -> None:
    """Write what was measured as JSON, in a folder that need not be there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


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
