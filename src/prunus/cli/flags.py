"""Options that many commands have, and how their words become values; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token, convert

from prunus.errors import OptionError

__all__ = ["Flag", "ModelName", "split_commas", "split_numbers", "split_whole_numbers", "whole_numbers"]

ModelName = Annotated[str, Parameter(name="MODEL")]
Flag = Annotated[bool, Parameter(negative="")]


def whole_numbers(type_: Any, tokens: Any) -> Any:
    """What the command line gives a parameter; cyclopts by itself rounds 2.5 where a whole number is wanted."""
    if type_ is int or type_ == int | None:
        for token in tokens:
            if "." in token.value and not token.value.partition(".")[2].strip("0") == "":
                raise OptionError(f"{token.keyword or 'the argument'} is {token.value}; give a whole number")
    return convert(type_, tokens)


def split_commas(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """`a,b c` as a, b and c."""
    return tuple(part.strip() for token in tokens for part in token.value.split(",") if part.strip())


def split_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    """`0.1,0.2` as numbers."""
    return tuple(_number(part, "0.1,0.2,0.4") for part in split_commas(type_, tokens))


def _number(text: str, example: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"{text!r} is no number; write e.g. {example}") from None


def split_whole_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """`0,1` as whole numbers."""
    try:
        return tuple(int(part) for part in split_commas(type_, tokens))
    except ValueError as error:
        raise OptionError(f"{error}; write whole numbers such as 0,1") from error
