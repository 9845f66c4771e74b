"""A measured table of how long the blocks of a model take, and what cutting them saves by it.

`prunus profile` measures, on one machine, the time of a decoder layer's attention by its number of groups and of its
MLP by its number of channels (`prunus.evaluation.profiling`), for the prompt (prefill) and for each token after it
(decode). The model's time is the sum of its blocks' and of all else (embeddings, head, masks).

Between measured widths the time is taken to run straight; where a wider block was measured to be faster than a narrower
one, both get the mean (the nearest curve that never falls). The price of a group is the mean time that a group of the
whole block takes, so that importances are divided by saved time; what a cut saves is read off the curve. The two
differ, since time has steps and a part that only leaves with the block: the ranking is an approximation, the budget is
not.

Source of the nearest curve: Barlow et al. 1972, "Statistical Inference under Order Restrictions", section 1.2
(pooling adjacent violators).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import Field, field_validator, model_validator

from prunus.errors import PlanError
from prunus.files.json_file import Count, FileContent, check_content, check_format, read_json
from prunus.files.outputs import whole_file
from prunus.model.families import AXES, Axis
from prunus.model.geometry import Geometry
from prunus.selection.costs import Costs

__all__ = ["PHASES", "LatencyProfile", "Phase", "PhaseTimes", "ProfiledShape", "never_falling"]

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_FORMAT = "prunus-profile"
#: near the beginning of every profile
MARK = b'"prunus-profile"'
_VERSION = 1
#: more groups than any block has
WIDEST = 10**9
#: more seconds than anybody measures; sums of them in microseconds are finite
LONGEST = 1e9

_Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
#: width and seconds; a tuple in Python, a list in JSON
_Point = Annotated[tuple[Annotated[Count, Field(ge=1)], _Seconds], Field(strict=False)]
_Points = Annotated[list[_Point], Field(min_length=1, max_length=100_000, strict=False)]
_OneOrMore = Annotated[Count, Field(ge=1)]


class _TimesContent(FileContent):
    fixed: _Seconds
    attention: _Points
    mlp: _Points

    @field_validator("attention", "mlp")
    @classmethod
    def _ascends(cls, points: list[tuple[int, float]]) -> list[tuple[int, float]]:
        widths = [width for width, _ in points]
        if any(wider <= width for width, wider in pairwise(widths)):
            raise ValueError(f"its widths are {widths}, which must ascend")
        return points

    @model_validator(mode="after")
    def _takes_time(self) -> _TimesContent:
        if not self.fixed and not any(seconds for _, seconds in (*self.attention, *self.mlp)):
            raise ValueError("its times are all 0")
        return self


class _ShapeContent(FileContent):
    model_type: str
    hidden_size: Count
    head_dim: Count
    num_key_value_groups: Count
    vocab_size: Count


class _ProfileContent(FileContent):
    model: str
    shape: _ShapeContent
    device: str
    machine: str
    threads: _OneOrMore
    dtype: str
    torch: str
    transformers: str
    prompt_tokens: _OneOrMore
    new_tokens: _OneOrMore
    batch_size: _OneOrMore
    repeats: _OneOrMore
    prefill: _TimesContent
    decode: _TimesContent


@dataclass(frozen=True)
class ProfiledShape:
    """What a model must have in common with the one that was measured.

    Attributes:
        model_type: the family.
        hidden_size: width of the residual stream.
        head_dim: width of one head.
        num_key_value_groups: query heads per key/value head.
        vocab_size: rows of the head.
    """

    model_type: str
    hidden_size: int
    head_dim: int
    num_key_value_groups: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "model_type" and (type(value) is not int or value < 1):
                raise PlanError(f"{name} is {value!r}, which must be a whole number from 1 on")

    @classmethod
    def of(cls, geometry: Geometry) -> Self:
        """That of a model."""
        return cls(
            geometry.family.model_type,
            geometry.hidden_size,
            geometry.head_dim,
            geometry.num_key_value_groups,
            geometry.vocab_size,
        )


@dataclass(frozen=True)
class PhaseTimes:
    """Measured times of one phase, in seconds.

    Attributes:
        fixed: of all that stands outside the decoder layers.
        attention: (groups, seconds) of an attention block with its norms, by ascending groups.
        mlp: (channels, seconds) of an MLP block with its norms, by ascending channels.
    """

    fixed: float
    attention: tuple[tuple[int, float], ...]
    mlp: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        for axis in AXES:
            widths = [width for width, _ in self.points(axis)]
            if not all(type(width) is int and 0 < width <= WIDEST for width in widths) or sorted(set(widths)) != widths:
                raise PlanError(f"widths of {axis} are {widths}; they must be whole numbers from 1 on that ascend")
        seconds = [self.fixed, *(number for axis in AXES for _, number in self.points(axis))]
        for number in seconds:
            if type(number) not in (int, float) or not 0 <= number <= LONGEST:
                raise PlanError(f"a time is {number!r}; times are seconds, finite and not negative")
        if not any(seconds):
            raise PlanError("all times are 0: nothing could be saved of them")

    def points(self, axis: Axis) -> tuple[tuple[int, float], ...]:
        """The measured points of one axis."""
        return self.attention if axis == "attention" else self.mlp

    def seconds(self, axis: Axis, width: int) -> np.ndarray:
        """The time of a block with 0, 1, … `width` groups: float64 (width + 1,), never falling."""
        groups, seconds = zip((0, 0.0), *self.points(axis), strict=True)
        curve: np.ndarray = np.interp(np.arange(width + 1), groups, never_falling(seconds))
        return curve


@dataclass(frozen=True)
class LatencyProfile:
    """Times of a model's blocks on one machine, and what they were measured on.

    Attributes:
        model: the model, as it was named.
        shape: what fits other models to it.
        device: where it ran, an accelerator by its product name.
        machine: processor architecture and system.
        threads: CPU threads of torch.
        dtype: of weights and cache.
        torch: version.
        transformers: version.
        prompt_tokens: tokens of each prompt, which prefill is the time of.
        new_tokens: tokens after each; decode is the time of one of them.
        batch_size: prompts at a time.
        repeats: runs that counted.
        prefill: times of a prompt.
        decode: times of one token after it.
    """

    model: str
    shape: ProfiledShape
    device: str
    machine: str
    threads: int
    dtype: str
    torch: str
    transformers: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int
    prefill: PhaseTimes
    decode: PhaseTimes

    def __post_init__(self) -> None:
        for name in ("threads", "prompt_tokens", "new_tokens", "batch_size", "repeats"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)!r}, which must be a whole number from 1 on")

    def times(self, phase: Phase) -> PhaseTimes:
        """The times of one phase."""
        return self.prefill if phase == "prefill" else self.decode

    def check_fits(self, geometry: Geometry) -> None:
        """Raise unless the profile was made on a model of this shape; the number of layers is free.

        Raises:
            PlanError: naming what differs.
        """
        expected, found = asdict(self.shape), asdict(ProfiledShape.of(geometry))
        if differing := [name for name in expected if expected[name] != found[name]]:
            name = differing[0]
            raise PlanError(
                f"the latency profile was made on {self.model} with {name} {expected[name]}, the model has "
                f"{found[name]}: run `prunus profile` on this model"
            )
        for phase, axis in product(PHASES, AXES):
            widest = max((groups for groups, _ in self.times(phase).points(axis)), default=0)
            for layer_idx, widths in enumerate(geometry.widths):
                if widths[axis] > widest:
                    raise PlanError(
                        f"the latency profile has {phase} times of {self.model} with at most {widest} {axis} groups, "
                        f"layer {layer_idx} of the model has {widths[axis]}: run `prunus profile` on this model"
                    )

    def costs(self, geometry: Geometry, phase: Phase) -> Costs:
        """Microseconds that the parts of a model take.

        Raises:
            PlanError: the profile was made on a model of another shape.
        """
        self.check_fits(geometry)
        times = self.times(phase)
        curves = {
            (axis, width): 1e6 * times.seconds(axis, width)
            for axis in AXES
            for width in {widths[axis] for widths in geometry.widths}
        }
        blocks = [{axis: curves[axis, widths[axis]] for axis in AXES} for widths in geometry.widths]
        prices: list[Mapping[Axis, float]] = [
            {axis: float(layer[axis][-1]) / max(widths[axis], 1) for axis in AXES}
            for layer, widths in zip(blocks, geometry.widths, strict=True)
        ]
        unit = "prompt" if phase == "prefill" else "token"
        return Costs(f"microseconds of {phase} per {unit}", 1e6 * times.fixed, blocks, prices)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any, where: str = "the latency profile") -> Self:
        """Inverse of `to_dict`.

        Args:
            values: as `to_dict` gives them.
            where: what messages call it.

        Raises:
            PlanError: not a profile, a newer version, or fields that are missing or malformed.
        """
        check_format(values, _FORMAT, _VERSION, "latency profile", where, PlanError)
        content = check_content(_ProfileContent, values, where, PlanError)
        shape = ProfiledShape(**{field.name: getattr(content.shape, field.name) for field in fields(ProfiledShape)})
        times: dict[str, Any] = {
            phase: PhaseTimes(of_phase.fixed, tuple(of_phase.attention), tuple(of_phase.mlp))
            for phase, of_phase in (("prefill", content.prefill), ("decode", content.decode))
        }
        plain = {
            field.name: getattr(content, field.name) for field in fields(cls) if field.name not in ("shape", *times)
        }
        return cls(shape=shape, **times, **plain)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; a reader never sees a half-written file."""
        with whole_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What `save` writes."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile.

        Raises:
            PlanError: the file is missing, is not JSON, or is not a profile.
        """
        return cls.from_dict(read_json(Path(path), error=PlanError, what="the latency profile"), str(path))


def never_falling(values: Sequence[float]) -> np.ndarray:
    """The nearest (least squares) sequence that never falls: float64 of the same length."""
    # Runs of values that share their mean: (mean, length).
    runs: list[tuple[float, int]] = []
    for value in values:
        runs.append((float(value), 1))
        while len(runs) > 1 and runs[-2][0] > runs[-1][0]:
            (a, m), (b, n) = runs[-2:]
            runs[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return np.repeat([mean for mean, _ in runs], [length for _, length in runs])
