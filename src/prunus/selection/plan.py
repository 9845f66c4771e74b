"""The decision: which groups stay in every layer. Frozen, readable, and enough to redo a cut.

A plan knows nothing about how it was made or about weights. Its JSON is short: kept groups are written as ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunus.errors import PlanError
from prunus.files.outputs import whole_file
from prunus.model.families import AXES, Axis
from prunus.model.geometry import Geometry, LayerWidths

__all__ = ["KeptGroups", "Plan"]

_FORMAT = "prunus-plan"
#: near the beginning of every plan file
MARK = b'"prunus-plan"'
_VERSION = 1
_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*", re.ASCII)
#: far more groups than any layer has; a damaged file must not make us allocate the numbers it names
_MOST_GROUPS = 10_000_000


@dataclass(frozen=True)
class KeptGroups:
    """The groups of one decoder layer that stay, per axis, each in ascending order."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    def __getitem__(self, axis: Axis) -> tuple[int, ...]:
        """Kept groups of one axis."""
        return self.attention if axis == "attention" else self.mlp

    @property
    def widths(self) -> LayerWidths:
        """How many groups of each axis stay."""
        return LayerWidths(len(self.attention), len(self.mlp))


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
            for axis in AXES:
                groups = kept[axis]
                if any(b <= a for a, b in pairwise(groups)):
                    raise PlanError(f"layer {layer_idx}, {axis}: kept groups must ascend without repetition")
                if groups and not 0 <= groups[0] <= groups[-1] < before[axis]:
                    raise PlanError(
                        f"layer {layer_idx}, {axis}: kept groups {groups[0]}..{groups[-1]} are outside the "
                        f"{before[axis]} groups of the model"
                    )
        if not any(kept.attention or kept.mlp for kept in self.layers):
            raise PlanError("the plan removes every layer; nothing would be left of the model")

    @classmethod
    def keep_all(cls, geometry: Geometry) -> Plan:
        """The plan that changes nothing."""
        return cls.from_kept(geometry, [{axis: range(widths[axis]) for axis in AXES} for widths in geometry.widths])

    @classmethod
    def from_kept(cls, geometry: Geometry, kept: Sequence[dict[Axis, Iterable[int]]]) -> Plan:
        """Build a plan for a model from the kept groups of every layer, in any order."""
        layers = tuple(
            KeptGroups(*(tuple(sorted(int(group) for group in layer[axis])) for axis in AXES)) for layer in kept
        )
        return cls(geometry.family.model_type, geometry.widths, layers)

    @property
    def surviving_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that keep at least one block."""
        return tuple(i for i, kept in enumerate(self.layers) if kept.attention or kept.mlp)

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
            PlanError: another family, number of layers or number of groups; or a part of a block that is indivisible.
        """
        if self.model_type != geometry.family.model_type:
            raise PlanError(f"the plan is for family {self.model_type!r}, the model is {geometry.family.model_type!r}")
        if len(self.widths) != len(geometry.widths):
            raise PlanError(f"the plan is for {len(self.widths)} decoder layers, the model has {len(geometry.widths)}")
        for layer_idx, (expected, found) in enumerate(zip(self.widths, geometry.widths, strict=True)):
            if expected != found:
                raise PlanError(f"layer {layer_idx}: the plan is for {expected}, the model has {found}")
            for block in geometry.family.blocks:
                kept = len(self.layers[layer_idx][block.axis])
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
            layers[layer_idx] = KeptGroups(*(tuple(before[axis][group] for group in kept[axis]) for axis in AXES))
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
            for axis in AXES:
                number = {group: position for position, group in enumerate(earlier.layers[layer_idx][axis])}
                gone = [group for group in self.layers[layer_idx][axis] if group not in number]
                if gone:
                    raise PlanError(f"layer {layer_idx}, {axis}: group {gone[0]} is to be kept, but is cut already")
                layer[axis] = [number[group] for group in self.layers[layer_idx][axis]]
            kept.append(layer)
        dead = set(range(len(self.layers))) - set(earlier.surviving_layers)
        if revived := [i for i in sorted(dead) if self.layers[i].attention or self.layers[i].mlp]:
            raise PlanError(f"layer {revived[0]} is to be kept, but is cut already")
        return Plan.from_kept(geometry, kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; kept groups as ranges such as `0-5,8`."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "model_type": self.model_type,
            "layers": [
                {axis: {"groups": before[axis], "kept": _to_ranges(kept[axis])} for axis in AXES}
                for before, kept in zip(self.widths, self.layers, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, values: Any) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            PlanError: not a plan, a newer version, or kept groups that do not exist.
        """
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise PlanError(f"not a prunus plan: the field 'format' must be {_FORMAT!r}")
        if values.get("version") != _VERSION:
            raise PlanError(f"plan version {values.get('version')!r} is not {_VERSION}, which this prunus reads")
        try:
            entries = [
                {axis: (layer[axis]["groups"], layer[axis]["kept"]) for axis in AXES} for layer in values["layers"]
            ]
            model_type = values["model_type"]
        except (KeyError, TypeError) as error:
            raise PlanError(f"malformed plan: {type(error).__name__} {error} while reading its layers") from error
        if not isinstance(model_type, str):
            raise PlanError(f"malformed plan: model_type is {model_type!r}, not the name of a family")
        widths, layers = [], []
        for layer_idx, entry in enumerate(entries):
            for axis in AXES:
                groups = entry[axis][0]
                if type(groups) is not int or not 0 <= groups <= _MOST_GROUPS:
                    raise PlanError(f"layer {layer_idx}, {axis}: {groups!r} is not a number of groups")
            widths.append(LayerWidths(*(entry[axis][0] for axis in AXES)))
            layers.append(
                KeptGroups(
                    *(_from_ranges(entry[axis][1], entry[axis][0], f"layer {layer_idx}, {axis}") for axis in AXES)
                )
            )
        return cls(model_type, tuple(widths), tuple(layers))

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a reader never sees a half-written file."""
        with whole_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the file is missing, is not JSON, or is not a plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
            raise PlanError(f"{path} is not JSON: {error}") from error
        try:
            return cls.from_dict(values)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _to_ranges(groups: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for group in groups:
        if ranges and ranges[-1][1] == group - 1:
            ranges[-1][1] = group
        else:
            ranges.append([group, group])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _from_ranges(text: Any, groups: int, where: str) -> tuple[int, ...]:
    if not isinstance(text, str) or (text and not _RANGES.fullmatch(text)):
        raise PlanError(f"{where}: kept groups {text!r} are not ranges such as '0-5,8'")
    kept: list[int] = []
    for part in text.split(",") if text else ():
        digits = part.split("-")
        if max(map(len, digits)) > 9 or int(digits[-1]) >= groups:
            raise PlanError(f"{where}: kept groups {part!r} are outside the {groups} groups of the model")
        first, last = int(digits[0]), int(digits[-1])
        # Checked range by range, so that no more numbers are allocated than there are groups.
        if first > last or (kept and first <= kept[-1]):
            raise PlanError(f"{where}: kept groups {part!r} must ascend without repetition")
        kept.extend(range(first, last + 1))
    return tuple(kept)
