"""Options of the commands that measure time: those of the package, which import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

from prunus.evaluation.speed_options import SpeedOptions

__all__ = ["ProfileFlags", "ProfileRuns", "SpeedFlags"]


@dataclass(frozen=True)
class ProfileRuns(SpeedOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = SpeedOptions.__doc__
    memory: Annotated[bool, Parameter(parse=False)] = False


RUNS = Group("Runs", sort_key=8)
SpeedFlags = Annotated[SpeedOptions, Parameter(name="*", group=RUNS)]
ProfileFlags = Annotated[ProfileRuns, Parameter(name="*", group=RUNS)]
