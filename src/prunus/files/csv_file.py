"""Tables as CSV files, read without losing a digit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

__all__ = ["read_table"]


def read_table(path: Path, text: Sequence[str]) -> pd.DataFrame:
    """Read a table of numbers, each exactly as it was written, and empty cells as NaN.

    pandas' own exact reading (`float_precision`) is deprecated, and before pandas 4 its default is not exact.

    Args:
        path: the file.
        text: columns of text, of which none is taken for a missing value, whatever it says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table.
    """
    columns = pd.read_csv(path, nrows=0, compression=None).columns
    exact = {name: _number for name in columns if name not in text}
    kinds = {name: str for name in columns if name in text}
    return pd.read_csv(path, converters=exact, dtype=kinds, keep_default_na=False, compression=None)


def _number(cell: str) -> float | str:
    """A cell's number; what is none stays as it is, for whoever checks the column to name."""
    if cell.isascii() and cell.isdigit() and len(cell) < 19:  # beyond that pandas has no integers
        return int(cell)
    try:
        return float(cell) if cell else float("nan")
    except ValueError:
        return cell
