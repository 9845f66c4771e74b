"""A group that can be printed: which rows and columns of which tensors are cut together, and what that saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prunus.errors import OptionError
from prunus.model.dimensions import SPACE_AXIS
from prunus.model.families import ALL_AXES, Axis
from prunus.model.geometry import Geometry

__all__ = ["Group", "Part"]


@dataclass(frozen=True)
class Part:
    """Consecutive rows or columns of a tensor.

    Attributes:
        tensor: full parameter name, e.g. `model.layers.3.mlp.up_proj.weight`.
        dim: 0 for rows (and for a bias), 1 for columns; of a tensor that holds all experts, the dimension of the
            experts.
        start: first index.
        stop: one past the last index.
        parameters: number of entries.
        kind: what is counted along the dimension, where that is neither rows nor columns: expert or head.
    """

    tensor: str
    dim: int
    start: int
    stop: int
    parameters: int
    kind: str | None = None

    @property
    def indices(self) -> str:
        """For a reader: `rows 16–31`."""
        place = ("column" if self.dim else "row") if self.kind is None else self.kind
        return f"{place} {self.start}" if self.stop == self.start + 1 else f"{place}s {self.start}–{self.stop - 1}"

    def __str__(self) -> str:
        return f"{self.tensor}: {self.indices}, {self.parameters:,} parameters"


@dataclass(frozen=True)
class Group:
    """One group of a model.

    Attributes:
        geometry: shape of the model.
        layer_idx: decoder layer, from 0.
        axis: attention, mlp or expert.
        group_idx: key/value head, channel or expert, from 0.
        biases: names of projections that have a bias, e.g. `self_attn.q_proj`.
        stacks: entries of one group in each tensor that belongs to no linear module, by its path.
    """

    geometry: Geometry
    layer_idx: int
    axis: Axis
    group_idx: int
    biases: frozenset[str] = frozenset()
    stacks: Mapping[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(
        cls,
        text: str,
        geometry: Geometry,
        biases: frozenset[str] = frozenset(),
        stacks: Mapping[str, int] | None = None,
    ) -> Group:
        """A group from `LAYER:AXIS:GROUP`, e.g. `3:mlp:17`.

        Raises:
            OptionError: it is written in another way, or the model has no such group.
        """
        layer, _, rest = text.partition(":")
        axis, _, number = rest.partition(":")
        if axis not in ALL_AXES or not (layer.isdecimal() and number.isdecimal()):
            raise OptionError(f"group {text!r} is not LAYER:AXIS:GROUP, e.g. 3:mlp:17 or 0:attention:1")
        group = cls(geometry, int(layer), axis, int(number), biases, stacks or {})
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
        block = geometry.block(self.layer_idx, self.axis)
        for stack in block.stacks if block else ():
            unit = geometry.unit(stack.space)
            start, name = self.group_idx * unit, f"{geometry.family.layers}.{self.layer_idx}.{stack.path}"
            yield Part(name, stack.dim, start, start + unit, self.stacks[stack.path], stack.space)
        for projection in block.projections if block else ():
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
