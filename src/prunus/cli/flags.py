"""Options of the commands: the option classes of the package, with what a command line needs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token, convert

from prunus.errors import OptionError
from prunus.evaluation.evaluate import EvalOptions
from prunus.evaluation.speed import SpeedOptions
from prunus.pipeline.inputs import ModelOptions
from prunus.recovery import RecoveryOptions, TextOptions
from prunus.sweep import EngineChoice


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
    try:
        return tuple(float(part) for part in split_commas(type_, tokens))
    except ValueError as error:
        raise OptionError(f"{error}; write numbers such as 0.1,0.2,0.4") from error


def split_whole_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """`0,1` as whole numbers."""
    try:
        return tuple(int(part) for part in split_commas(type_, tokens))
    except ValueError as error:
        raise OptionError(f"{error}; write whole numbers such as 0,1") from error


@dataclass(frozen=True)
class Where(ModelOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = ModelOptions.__doc__
    engine: Annotated[EngineChoice, Parameter(parse=False)] = "auto"
    batch_size: Annotated[int, Parameter(parse=False)] = 1


@dataclass(frozen=True)
class ProfileRuns(SpeedOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = SpeedOptions.__doc__
    memory: Annotated[bool, Parameter(parse=False)] = False


@dataclass(frozen=True)
class EvalSettings(EvalOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = EvalOptions.__doc__
    text: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")] = ()
    tasks: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")] = ()
    harness: Annotated[tuple[str, ...], Parameter(converter=split_commas, negative="")] = ()
    harness_path: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")] = ()
    samples: Annotated[bool, Parameter(negative="")] = False
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ()
    speed: Annotated[bool, Parameter(negative="")] = False


ModelName = Annotated[str, Parameter(name="MODEL")]
ModelFlags = Annotated[Where, Parameter(name="*", group=Group("Model", sort_key=1))]
RUNS = Group("Runs", sort_key=8)
SpeedFlags = Annotated[SpeedOptions, Parameter(name="*", group=RUNS)]
ProfileFlags = Annotated[ProfileRuns, Parameter(name="*", group=RUNS)]
EvalFlags = Annotated[EvalSettings, Parameter(name="*", group=Group("Evaluation", sort_key=6))]
TextFlags = Annotated[TextOptions, Parameter(name="*", group=Group("Text", sort_key=9))]
RecoveryFlags = Annotated[RecoveryOptions, Parameter(name="*", group=Group("Training", sort_key=10))]
Flag = Annotated[bool, Parameter(negative="")]
