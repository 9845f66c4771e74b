"""The decision: which groups stay in every layer. Frozen, readable, and enough to redo a cut.

A plan knows nothing about how it was made or about weights. Its JSON is short: kept groups are written as ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prunus.errors import PlanError
from prunus.files.json_file import FileContent, check_content, check_format, read_json
from prunus.files.outputs import whole_file
from prunus.model.families import ALL_AXES, AXES, FAMILIES, Axis
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths

__all__ = ["KeptGroups", "Plan"]

_FORMAT = "prunus-plan"
#: near the beginning of every plan file
MARK = b'"prunus-plan"'
_VERSION = 1
_RANGES = re.compile(r"(\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*)?", re.ASCII)
#: twice what the widest layer of any published model has (59,392 channels), and a quarter more than all layers of the
#: largest: kept groups are written as ranges, and a file of a few bytes must not unfold to whatever it says
MOST_GROUPS_PER_LAYER = 2**17
MOST_GROUPS = 2**23
MOST_LAYERS = 4096


class _AxisContent(FileContent):
    groups: Annotated[int, Field(ge=0, le=MOST_GROUPS_PER_LAYER)]
    kept: Annotated[str, Field(max_length=8 * MOST_GROUPS_PER_LAYER)]


class _LayerContent(FileContent):
    attention: _AxisContent | None = None
    mlp: _AxisContent | None = None
    expert: _AxisContent | None = None

    def on(self, axes: Iterable[Axis]) -> dict[Axis, _AxisContent]:
        """What it says of each axis."""
        return {axis: content for axis in axes if (content := getattr(self, axis)) is not None}


class _PlanContent(FileContent):
    format: Literal["prunus-plan"]
    version: Literal[1]
    model_type: Annotated[str, Field(min_length=1, max_length=100)]
    layers: Annotated[list[_LayerContent], Field(min_length=1, max_length=MOST_LAYERS)]

    @model_validator(mode="after")
    def _bounded(self) -> _PlanContent:
        for layer_idx, layer in enumerate(self.layers):
            if missing := [axis for axis in _axes_of(self.model_type) if getattr(layer, axis) is None]:
                raise ValueError(f"layers.{layer_idx}.{missing[0]} is missing")
        total = sum(content.groups for layer in self.layers for content in layer.on(ALL_AXES).values())
        if total > MOST_GROUPS:
            raise ValueError(f"its layers have {total:,} groups, and no plan has more than {MOST_GROUPS:,}")
        return self


@dataclass(frozen=True)
class KeptGroups:
    """The groups of one decoder layer that stay, per axis, each in ascending order."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    expert: tuple[int, ...] = ()

    @classmethod
    def of(cls, groups: Mapping[Axis, Iterable[int]]) -> KeptGroups:
        """From the groups of each axis, in any order; an axis that is not named keeps none."""
        return cls(*(tuple(sorted(int(group) for group in groups.get(axis, ()))) for axis in ALL_AXES))

    def __getitem__(self, axis: Axis) -> tuple[int, ...]:
        """Kept groups of one axis."""
        if axis == "expert":
            return self.expert
        return self.attention if axis == "attention" else self.mlp

    def __bool__(self) -> bool:
        """Whether anything of the layer stays."""
        return bool(self.attention or self.mlp or self.expert)

    @property
    def widths(self) -> LayerWidths:
        """How many groups of each axis stay."""
        return LayerWidths.of({axis: len(self[axis]) for axis in ALL_AXES})


@dataclass(frozen=True)
class Plan:
    """Which groups of which layer stay.

    Attributes:
        model_type: the family the plan is for.
        widths: groups per axis of every decoder layer of the model that the plan applies to.
        layers: the groups that stay, one entry per decoder layer of that model.
    """

    model_type: str
    widths: tuple[LayerWidths, ...]
    layers: tuple[KeptGroups, ...]

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.layers):
            raise PlanError(f"the plan describes {len(self.layers)} layers for a model of {len(self.widths)}")
        for layer_idx, (before, kept) in enumerate(zip(self.widths, self.layers, strict=True)):
            for axis in ALL_AXES:
                groups = kept[axis]
                if any(b <= a for a, b in pairwise(groups)):
                    raise PlanError(f"layer {layer_idx}, {axis}: kept groups must ascend without repetition")
                if groups and not 0 <= groups[0] <= groups[-1] < before[axis]:
                    raise PlanError(
                        f"layer {layer_idx}, {axis}: kept groups {groups[0]}..{groups[-1]} are outside the "
                        f"{before[axis]} groups of the model"
                    )
        if not any(self.layers):
            raise PlanError("the plan removes every layer; nothing would be left of the model")

    @classmethod
    def keep_all(cls, geometry: Geometry) -> Plan:
        """The plan that changes nothing."""
        return cls.from_kept(
            geometry, [{axis: range(widths[axis]) for axis in geometry.axes} for widths in geometry.widths]
        )

    @classmethod
    def from_kept(cls, geometry: Geometry, kept: Sequence[dict[Axis, Iterable[int]]]) -> Plan:
        """Build a plan for a model from the kept groups of every layer, in any order."""
        return cls(geometry.family.model_type, geometry.widths, tuple(KeptGroups.of(layer) for layer in kept))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The kinds of group that layers of its family consist of."""
        return _axes_of(self.model_type)

    @property
    def surviving_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that keep at least one block."""
        return tuple(i for i, kept in enumerate(self.layers) if kept)

    @property
    def kept_widths(self) -> tuple[LayerWidths, ...]:
        """Groups per axis after the cut, one entry per decoder layer of the model before it."""
        return tuple(kept.widths for kept in self.layers)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal for equal decisions."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def check_fits(self, geometry: Geometry) -> None:
        """Raise unless the plan was made for a model of this shape, and the model can be cut so.

        Raises:
            PlanError: another family, number of layers or number of groups; a part of a block that is indivisible; or
                fewer experts than each token goes to.
        """
        _check_widths(self.model_type, self.widths, geometry)
        for layer_idx, found in enumerate(geometry.widths):
            for block in geometry.blocks(layer_idx):
                kept = len(self.layers[layer_idx][block.axis])
                if kept < (least := geometry.least(block.axis)) and self.layers[layer_idx]:
                    raise PlanError(
                        f"layer {layer_idx}: the plan keeps {kept} of {found[block.axis]} experts, and the model sends "
                        f"each token to {least} (num_experts_per_tok): at least so many must stay"
                    )
                if block.indivisible and 0 < kept < found[block.axis]:
                    raise PlanError(
                        f"layer {layer_idx}: the plan keeps {kept} of {found[block.axis]} {block.axis} groups, but in "
                        f"{geometry.family.title} a norm runs over all of them, so that they stay or go together"
                    )

    def compose(self, later: Plan) -> Plan:
        """This cut followed by another one, as one plan for the model before this cut.

        Args:
            later: a plan for the model that this plan leaves.

        Raises:
            PlanError: `later` does not fit what this plan leaves.
        """
        survivors = self.surviving_layers
        left = tuple(self.layers[i].widths for i in survivors)
        # The family is not compared: a Llama whose heads no longer divide its hidden size goes on as a Mistral.
        if later.widths != left:
            raise PlanError("the second plan was not made for the model that the first one leaves")
        layers = [KeptGroups((), ())] * len(self.layers)
        for layer_idx, kept in zip(survivors, later.layers, strict=True):
            before = self.layers[layer_idx]
            layers[layer_idx] = KeptGroups.of(
                {axis: [before[axis][group] for group in kept[axis]] for axis in ALL_AXES}
            )
        return Plan(self.model_type, self.widths, tuple(layers))

    def after(self, earlier: Plan, geometry: Geometry) -> Plan:
        """What is left of this cut to do once an earlier one is done; `earlier.compose` of it is this plan again.

        Args:
            earlier: a plan for the same model that cut no group which this one keeps.
            geometry: shape of the model that `earlier` leaves.

        Raises:
            PlanError: the plans are for different models, or this one keeps a group that is gone.
        """
        if self.widths != earlier.widths:
            raise PlanError("the earlier plan was not made for the same model")
        kept: list[dict[Axis, Iterable[int]]] = []
        for layer_idx in earlier.surviving_layers:
            layer: dict[Axis, Iterable[int]] = {}
            for axis in ALL_AXES:
                number = {group: position for position, group in enumerate(earlier.layers[layer_idx][axis])}
                gone = [group for group in self.layers[layer_idx][axis] if group not in number]
                if gone:
                    raise PlanError(f"layer {layer_idx}, {axis}: group {gone[0]} is to be kept, but is cut already")
                layer[axis] = [number[group] for group in self.layers[layer_idx][axis]]
            kept.append(layer)
        dead = set(range(len(self.layers))) - set(earlier.surviving_layers)
        if revived := [i for i in sorted(dead) if self.layers[i]]:
            raise PlanError(f"layer {revived[0]} is to be kept, but is cut already")
        return Plan.from_kept(geometry, kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; kept groups as ranges such as `0-5,8`."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "model_type": self.model_type,
            "layers": [
                {axis: {"groups": before[axis], "kept": _to_ranges(kept[axis])} for axis in self.axes}
                for before, kept in zip(self.widths, self.layers, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, values: Any, geometry: Geometry | None = None, where: str = "the plan") -> Plan:
        """Inverse of `to_dict`.

        Args:
            values: as `to_dict` gives them.
            geometry: of the model that the plan has to be for, which is checked before ranges are unfolded.
            where: what messages call it.

        Raises:
            PlanError: not a plan, a newer version, kept groups that do not exist, or another model than `geometry`.
        """
        check_format(values, _FORMAT, _VERSION, "prunus plan", where, PlanError)
        content = check_content(_PlanContent, values, where, PlanError)
        axes = _axes_of(content.model_type)
        widths = tuple(
            LayerWidths.of({axis: on.groups for axis, on in layer.on(axes).items()}) for layer in content.layers
        )
        try:
            if geometry is not None:
                _check_widths(content.model_type, widths, geometry)
            layers = tuple(
                KeptGroups.of(
                    {
                        axis: _from_ranges(on.kept, on.groups, f"layer {layer_idx}, {axis}")
                        for axis, on in layer.on(axes).items()
                    }
                )
                for layer_idx, layer in enumerate(content.layers)
            )
            return cls(content.model_type, widths, layers)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a reader never sees a half-written file."""
        with whole_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, geometry: Geometry | None = None) -> Plan:
        """Read a plan.

        Args:
            path: the file.
            geometry: of the model that the plan has to be for, if that is known.

        Raises:
            PlanError: the file is missing, is not JSON, is not a plan, or is one for another model than `geometry`.
        """
        path = Path(path)
        if path.is_dir():
            held = [name for name in ("plan.json", "prunus/plan.json") if (path / name).is_file()]
            raise PlanError(f"{path} is a folder; name the plan{f', {path / held[0]}' if held else ' file itself'}")
        return cls.from_dict(read_json(path, error=PlanError, what="the plan"), geometry, str(path))


def _axes_of(model_type: str) -> tuple[Axis, ...]:
    """The axes of a family; of one that is not known, those of a dense model."""
    family = FAMILIES.get(model_type)
    return family.axes if family else AXES


def _check_widths(model_type: str, widths: Sequence[LayerWidths], geometry: Geometry) -> None:
    """Raise PlanError unless a plan of these widths is for a model of this shape."""
    if model_type != geometry.family.model_type:
        raise PlanError(f"the plan is for family {model_type!r}, the model is {geometry.family.model_type!r}")
    if len(widths) != len(geometry.widths):
        raise PlanError(f"the plan is for {len(widths)} decoder layers, the model has {len(geometry.widths)}")
    for layer_idx, (expected, found) in enumerate(zip(widths, geometry.widths, strict=True)):
        if expected != found:
            raise PlanError(f"layer {layer_idx}: the plan is for {expected}, the model has {found}")


def _to_ranges(groups: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for group in groups:
        if ranges and ranges[-1][1] == group - 1:
            ranges[-1][1] = group
        else:
            ranges.append([group, group])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _from_ranges(text: str, groups: int, where: str) -> tuple[int, ...]:
    if not _RANGES.fullmatch(text):
        raise PlanError(f"{where}: kept groups {_cut_short(text)} are not ranges such as '0-5,8'")
    kept: list[int] = []
    for part in text.split(",") if text else ():
        digits = part.split("-")
        first, last = int(digits[0]), int(digits[-1])
        if last >= groups:
            raise PlanError(f"{where}: kept groups {part!r} are outside the {groups} groups of the model")
        # Checked range by range, so that no more numbers are allocated than there are groups.
        if first > last or (kept and first <= kept[-1]):
            raise PlanError(f"{where}: kept groups {part!r} must ascend without repetition")
        kept.extend(range(first, last + 1))
    return tuple(kept)


def _cut_short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
