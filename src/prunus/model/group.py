"""A group that can be printed: which rows and columns of which tensors are cut together, and what that saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prunus.errors import OptionError
from prunus.model.families import AXES, Axis
from prunus.model.geometry import SPACE_AXIS, Geometry

__all__ = ["Group", "Part"]


@dataclass(frozen=True)
class Part:
    """Consecutive rows or columns of a tensor.

    Attributes:
        tensor: full parameter name, e.g. `model.layers.3.mlp.up_proj.weight`.
        dim: 0 for rows (and for a bias), 1 for columns.
        start: first index.
        stop: one past the last index.
        parameters: number of entries.
    """

    tensor: str
    dim: int
    start: int
    stop: int
    parameters: int

    @property
    def indices(self) -> str:
        """For a reader: `rows 16–31`."""
        place = "column" if self.dim else "row"
        return f"{place} {self.start}" if self.stop == self.start + 1 else f"{place}s {self.start}–{self.stop - 1}"

    def __str__(self) -> str:
        return f"{self.tensor}: {self.indices}, {self.parameters:,} parameters"


@dataclass(frozen=True)
class Group:
    """One group of a model.

    Attributes:
        geometry: shape of the model.
        layer_idx: decoder layer, from 0.
        axis: attention or mlp.
        group_idx: key/value head or channel, from 0.
        biases: names of projections that have a bias, e.g. `self_attn.q_proj`.
    """

    geometry: Geometry
    layer_idx: int
    axis: Axis
    group_idx: int
    biases: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str, geometry: Geometry, biases: frozenset[str] = frozenset()) -> Group:
        """A group from `LAYER:AXIS:GROUP`, e.g. `3:mlp:17`.

        Raises:
            OptionError: it is written in another way, or the model has no such group.
        """
        layer, _, rest = text.partition(":")
        axis, _, number = rest.partition(":")
        if axis not in AXES or not (layer.isdecimal() and number.isdecimal()):
            raise OptionError(f"group {text!r} is not LAYER:AXIS:GROUP, e.g. 3:mlp:17 or 0:attention:1")
        group = cls(geometry, int(layer), axis, int(number), biases)
        if group.layer_idx >= len(geometry.widths):
            raise OptionError(f"group {text!r}: the model has layers 0 to {len(geometry.widths) - 1}")
        if group.group_idx >= (count := geometry.widths[group.layer_idx][axis]):
            has = f"groups 0 to {count - 1}" if count else "none"
            raise OptionError(f"group {text!r}: of {axis} groups layer {layer} has {has}")
        return group

    @property
    def cost(self) -> int:
        """Parameters that leave with it."""
        return self.geometry.group_parameters[self.axis]

    def parts(self) -> Iterator[Part]:
        """Everything that is cut with it, projection by projection."""
        geometry = self.geometry
        for projection in geometry.family.block(self.axis).projections:
            name = f"{geometry.family.layers}.{self.layer_idx}.{projection.path}"
            columns = geometry.size(self.layer_idx, projection.inputs)
            for space, first, _ in geometry.output_parts(self.layer_idx, projection):
                if space in SPACE_AXIS:
                    unit = geometry.unit(space)
                    start = first + self.group_idx * unit
                    yield Part(f"{name}.weight", 0, start, start + unit, unit * columns)
                    if projection.path in self.biases:
                        yield Part(f"{name}.bias", 0, start, start + unit, unit)
            if projection.inputs in SPACE_AXIS:
                unit = geometry.unit(projection.inputs)
                rows = sum(geometry.size(self.layer_idx, space) for space in projection.outputs)
                yield Part(f"{name}.weight", 1, self.group_idx * unit, (self.group_idx + 1) * unit, unit * rows)

    def __str__(self) -> str:
        head = f"layer {self.layer_idx}, {self.axis} group {self.group_idx}: {self.cost:,} parameters"
        return "\n".join([head, *(f"  {part}" for part in self.parts())])
