"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunus.cli.terminal import quoted_command
from prunus.escaping import terminal_text

__all__ = ["parameter_rows", "print_json", "print_rows", "short", "typed_command"]

out_console = Console()


def typed_command() -> str:
    """The command line that is running, as it can be typed again."""
    return quoted_command("prunus", sys.argv[1:])


def print_json(values: Any) -> None:
    """Values as JSON on stdout."""
    # JSON escapes all control characters but this one.
    print(jsonlib.dumps(values, indent=1).replace("\x7f", "\\u007f"))


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, numbers to the right."""
    table = Table(title=_text(title), title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(_text(column), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    out_console.print(table)


def parameter_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Parameters before and after: of a language model, and of the multimodal model around it, if there is one."""
    whole = metrics.get("whole")
    named = [("parameters of the language model" if whole else "parameters", metrics)]
    named += [("parameters in all", whole)] if whole else []
    return [(name, f"{of['parameters_before']:,}", f"{of['parameters_after']:,}") for name, of in named]


def _text(value: str) -> Text:
    # Of a string, rich would take "[red]" for markup; a cell with a tab it makes too narrow.
    return Text(terminal_text(value).expandtabs(4))


def short(value: Any) -> str:
    """A value as a cell of a table shows it."""
    if isinstance(value, float):
        return "" if value != value else f"{value:,.5g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(inner)}" for name, inner in value.items())
    return str(value)
