"""Options of the commands that are option classes of the package, with what a command line needs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from prunus.cli.flags import split_commas
from prunus.evaluation.evaluate import EvalOptions
from prunus.evaluation.speed import SpeedOptions
from prunus.recovery import RecoveryOptions, TextOptions
from prunus.sweep import EngineChoice
from prunus.sweep.engine import ModelOptions

__all__ = [
    "EvalFlags",
    "EvalSettings",
    "ModelFlags",
    "ProfileFlags",
    "ProfileRuns",
    "RecoveryFlags",
    "SpeedFlags",
    "TextFlags",
    "Where",
]


@dataclass(frozen=True)
class Where(ModelOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = ModelOptions.__doc__
    engine: Annotated[EngineChoice, Parameter(parse=False)] = "auto"
    batch_size: Annotated[int | Literal["auto"], Parameter(parse=False)] = "auto"


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


ModelFlags = Annotated[Where, Parameter(name="*", group=Group("Model", sort_key=1))]
RUNS = Group("Runs", sort_key=8)
SpeedFlags = Annotated[SpeedOptions, Parameter(name="*", group=RUNS)]
ProfileFlags = Annotated[ProfileRuns, Parameter(name="*", group=RUNS)]
EvalFlags = Annotated[EvalSettings, Parameter(name="*", group=Group("Evaluation", sort_key=6))]
TextFlags = Annotated[TextOptions, Parameter(name="*", group=Group("Text", sort_key=9))]
RecoveryFlags = Annotated[RecoveryOptions, Parameter(name="*", group=Group("Training", sort_key=10))]
