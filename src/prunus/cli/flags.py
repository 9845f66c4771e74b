"""Options of the commands: the option classes of the package, with what a command line needs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token

from prunus.errors import OptionError
from prunus.evaluation.evaluate import EvalOptions
from prunus.evaluation.speed import SpeedOptions
from prunus.model.families import AXES, Axis
from prunus.pipeline.budget_search import SearchOptions
from prunus.pipeline.inputs import CalibrationOptions, EvaluationOptions, ModelOptions
from prunus.recovery import RecoveryOptions, TextOptions
from prunus.repair.compensation import CompensationOptions
from prunus.scoring.adaptive import AdaptiveOptions
from prunus.scoring.hybrid import DEFAULT_MIX, Weights
from prunus.scoring.priors import PriorOptions
from prunus.scoring.score import ScoringOptions
from prunus.selection.constraints import ALIGNMENTS, Constraints, Shape
from prunus.selection.latency_profile import LatencyProfile
from prunus.selection.targets import TargetOptions


def split_commas(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """`a,b c` as a, b and c."""
    return tuple(part.strip() for token in tokens for part in token.value.split(",") if part.strip())


def split_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    """`0.1,0.2` as numbers."""
    try:
        return tuple(float(part) for part in split_commas(type_, tokens))
    except ValueError as error:
        raise OptionError(f"{error}; write numbers such as 0.1,0.2,0.4") from error


def _split_weights(type_: Any, tokens: Sequence[Token]) -> tuple[tuple[str, float], ...]:
    try:
        pairs = [part.split("=") for part in split_commas(type_, tokens)]
        return tuple((name.strip(), float(weight)) for name, weight in pairs)
    except ValueError as error:
        raise OptionError(f"hybrid: {error}; write methods and weights such as taylor=0.5,wanda=0.5") from error


def _alignment(type_: Any, tokens: Sequence[Token]) -> int:
    text = tokens[0].value
    try:
        return ALIGNMENTS[text] if text in ALIGNMENTS else int(text)
    except ValueError:
        raise OptionError(f"align {text!r} is neither a number nor one of {', '.join(ALIGNMENTS)}") from None


def _profile(type_: Any, tokens: Sequence[Token]) -> LatencyProfile:
    return LatencyProfile.load(tokens[0].value)


def _join_weights(weights: Weights) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in weights)


@dataclass(frozen=True)
class Adaptive(AdaptiveOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = AdaptiveOptions.__doc__
    candidates: Annotated[tuple[str, ...], Parameter(converter=split_commas, negative="")] = AdaptiveOptions.candidates


@dataclass(frozen=True)
class Scoring(ScoringOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = ScoringOptions.__doc__
    hybrid: Annotated[
        Weights, Parameter(converter=_split_weights, n_tokens=1, negative="", show_default=_join_weights)
    ] = DEFAULT_MIX
    adaptive: Annotated[Adaptive, Parameter(name="*")] = field(default_factory=Adaptive)
    priors: Annotated[PriorOptions, Parameter(name="*")] = field(default_factory=PriorOptions)
    # One --seed for a run, that of the calibration options.
    random_seed: Annotated[int, Parameter(parse=False)] = 0


@dataclass(frozen=True)
class BestScoring(Scoring):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = ScoringOptions.__doc__
    method: str = "gate_fisher"
    # Options of the command, whose defaults depend on others.
    attention_weight: Annotated[float, Parameter(parse=False)] = 1.0
    score_noise: Annotated[float, Parameter(parse=False)] = 0.0


@dataclass(frozen=True)
class Selection(Constraints):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = Constraints.__doc__
    axes: Annotated[tuple[Axis, ...], Parameter(converter=split_commas, negative="")] = AXES
    align: Annotated[int, Parameter(converter=_alignment)] = 1
    shape: Shape = "ragged"


@dataclass(frozen=True)
class Target(TargetOptions):  # noqa: D101 (that of the class it extends, which is the help text)
    __doc__ = TargetOptions.__doc__
    profile: Annotated[
        LatencyProfile | None, Parameter(converter=_profile, n_tokens=1, negative="", accepts_keys=False)
    ] = None


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
ModelFlags = Annotated[ModelOptions, Parameter(name="*", group=Group("Model", sort_key=1))]
CalibrationFlags = Annotated[CalibrationOptions, Parameter(name="*", group=Group("Calibration", sort_key=2))]
SCORING = Group("Scoring", sort_key=3)
BestScoringFlags = Annotated[BestScoring, Parameter(name="*", group=SCORING)]
ScoringFlags = Annotated[Scoring, Parameter(name="*", group=SCORING)]
SELECTION = Group("Selection", sort_key=4)
SelectionFlags = Annotated[Selection, Parameter(name="*", group=SELECTION)]
TargetFlags = Annotated[Target, Parameter(name="*", group=SELECTION)]
SearchFlags = Annotated[SearchOptions, Parameter(name="*", group=SELECTION)]
COMPENSATION = Group("Compensation", sort_key=5)
CompensationFlags = Annotated[CompensationOptions, Parameter(name="*", group=COMPENSATION)]
EvaluationFlags = Annotated[EvaluationOptions, Parameter(name="*", group=Group("Evaluation", sort_key=6))]
RUNS = Group("Runs", sort_key=8)
SpeedFlags = Annotated[SpeedOptions, Parameter(name="*", group=RUNS)]
ProfileFlags = Annotated[ProfileRuns, Parameter(name="*", group=RUNS)]
EvalFlags = Annotated[EvalSettings, Parameter(name="*", group=Group("Evaluation", sort_key=6))]
TextFlags = Annotated[TextOptions, Parameter(name="*", group=Group("Text", sort_key=9))]
RecoveryFlags = Annotated[RecoveryOptions, Parameter(name="*", group=Group("Training", sort_key=10))]
Flag = Annotated[bool, Parameter(negative="")]
Rounds = Annotated[int, Parameter(group=SELECTION)]


def check_output_file(out: Path, what: str, overwrite: bool) -> None:
    """Raise unless a plan or profile can be written to this file."""
    if out.exists() and not overwrite:
        raise OptionError(f"{out} exists; choose another --out or add --overwrite")
    if out.is_dir():
        raise OptionError(f"{out} is a folder; --out is the {what} file to write, e.g. {out / f'{what}.json'}")


def seeded(scoring: ScoringOptions, calibration: CalibrationOptions) -> ScoringOptions:
    """The scoring options with the one seed of the run, and the method that the weights of a mixture ask for."""
    method = "hybrid" if scoring.hybrid != DEFAULT_MIX else scoring.method
    if method != scoring.method and scoring.method != type(scoring).method:
        raise OptionError(f"--hybrid goes with --method hybrid, not with --method {scoring.method}")
    return ScoringOptions(**{**scoring.__dict__, "method": method, "random_seed": calibration.seed})
