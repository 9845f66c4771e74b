"""What is typed after an option, before it becomes a value: numbers are numbers, and nothing is not a value."""

from __future__ import annotations

import re
from types import UnionType
from typing import Any, Union, get_args, get_origin

from cyclopts import App, ArgumentCollection

from prunus.errors import OptionError

__all__ = ["WrongUsage", "check_given", "check_number", "check_values", "check_whole_number"]


class WrongUsage(OptionError):
    """What was typed is no value of its option at all."""


#: as cyclopts reads them, but for a fraction, which it would round
_WHOLE = re.compile(r"[+-]?(0x[0-9a-f_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*(\.0*)?)", re.IGNORECASE)
_PERCENT = re.compile(r"([+-]?[0-9]*\.?[0-9]+) ?%")


def check_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse empty values, fractions where whole numbers belong, and texts that are no numbers.

    Args:
        app: the command line, for which this is a `config`.
        commands: that were typed.
        arguments: of the command, with what was typed for each.

    Raises:
        WrongUsage: naming the option and what was typed.
    """
    for argument in arguments:
        kinds = _kinds(argument.hint)
        if bool in kinds or not argument.tokens:
            continue
        for token in argument.tokens:
            text, name = token.value, token.keyword or argument.name
            if token.keyword and not text.strip():
                raise WrongUsage(f"{name} is empty: give a value, or leave the option out")
            if argument.parameter.converter:
                continue  # it reads a text of its own kind
            if int in kinds:
                check_whole_number(name, text)
            if float in kinds:
                check_number(name, text)
        if converter := argument.parameter.converter:
            # Here its errors come out as they are; later they would be wrapped.
            converter(argument.hint, argument.tokens)  # type: ignore[operator]


def check_given(**values: str | tuple[str, ...]) -> None:
    """Check that what a command cannot do without was typed, or stands in a recipe.

    Args:
        **values: name of an argument or option → its value, empty where it is missing.

    Raises:
        WrongUsage: naming what is missing.
    """
    for name, value in values.items():
        if not value:
            typed = name if name.isupper() else f"--{name}"
            raise WrongUsage(f"{typed} is missing: give one, or a recipe file that has it")


def check_number(name: str, text: str) -> float:
    """A number as it was typed.

    Raises:
        WrongUsage: it is none; a percentage is shown as the share that it means.
    """
    if percent := _PERCENT.fullmatch(text.strip()):
        raise WrongUsage(f"{name} is {text!r}; write a share, {float(percent[1]) / 100:g}")
    try:
        return float(text)
    except ValueError:
        raise WrongUsage(f"{name} is {text!r}; it takes a number such as 0.2") from None


def check_whole_number(name: str, text: str) -> int:
    """A whole number as it was typed.

    Raises:
        WrongUsage: it is none.
    """
    if not _WHOLE.fullmatch(text):
        raise WrongUsage(f"{name} is {text!r}; it takes a whole number")
    return int(text.partition(".")[0], 0)


def _kinds(hint: Any) -> set[Any]:
    """The types that a value may have."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*(_kinds(inner) for inner in get_args(hint)))
    return {hint}
