"""Options that many commands have, and how their words become values; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from prunus.cli.values import check_number, check_whole_number

__all__ = ["Flag", "ModelName", "OptionalModel", "split_commas", "split_numbers", "split_whole_numbers"]

ModelName = Annotated[str, Parameter(name="MODEL")]
OptionalModel = Annotated[str | None, Parameter(name="MODEL")]
Flag = Annotated[bool, Parameter(negative="")]


def split_commas(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """`a,b c` as a, b and c."""
    return tuple(part.strip() for token in tokens for part in token.value.split(",") if part.strip())


def split_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    """`0.1,0.2` as numbers."""
    return tuple(check_number(tokens[0].keyword or "a number", part) for part in split_commas(type_, tokens))


def split_whole_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """`0,1` as whole numbers."""
    return tuple(check_whole_number(tokens[0].keyword or "a number", part) for part in split_commas(type_, tokens))
