"""What selection may cut, and in what form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from prunus.errors import OptionError
from prunus.model.families import ALL_AXES, AXES, Axis, Block
from prunus.model.geometry import Geometry
from prunus.option_values import check_whole

__all__ = ["ALIGNMENTS", "SHAPES", "Constraints", "ModelConstraints", "Shape"]

#: the form of a cut, see `prunus.selection.shapes`
Shape = Literal["auto", "ragged", "uniform", "depth"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

#: names for alignments: tiles of a GPU's matrix units (twice as large on newer ones), blocks of llama.cpp's K-quants
ALIGNMENTS: dict[str, int] = {"gpu": 64, "gpu128": 128, "gguf": 256}


@dataclass(frozen=True)
class Constraints:
    """What selection may cut.

    Attributes:
        axes: the kinds of group that may be cut: attention, mlp, and in a mixture expert; null = attention and mlp, of
            a mixture its experts.
        layer_start: first decoder layer that may be cut.
        layer_end: one past the last decoder layer that may be cut; null = up to the last.
        min_keep_attention: attention groups that every layer keeps at least.
        min_keep_mlp: MLP channels that every layer keeps at least.
        min_keep_expert: experts that every layer that has any keeps at least; never fewer stay than each token goes to.
        align: kept MLP widths are multiples of this, unless the layer is not cut at all; on the command line also gpu
            (64), gpu128 (128) or gguf (256, for llama.cpp's K-quants).
        shape: ragged cuts wherever the score is lowest; uniform leaves all layers equally wide, depth removes whole
            layers (of one axis: whole blocks): stock classes load both. auto is ragged, of a mixture uniform.
        at_least: where a shape or an alignment does not give the ratio exactly, remove more rather than less; otherwise
            where that is more than 2 points more, the nearest share.
    """

    axes: tuple[Axis, ...] | None = None
    layer_start: int = 0
    layer_end: int | None = None
    min_keep_attention: int = 0
    min_keep_mlp: int = 0
    min_keep_expert: int = 0
    align: int = 1
    shape: Shape = "auto"
    at_least: bool = False

    def __post_init__(self) -> None:
        if self.axes is not None and (not self.axes or set(self.axes) - set(ALL_AXES)):
            raise OptionError(f"`axes` is {','.join(self.axes)!r}: choose from {', '.join(ALL_AXES)}")
        for name in ("layer_start", "min_keep_attention", "min_keep_mlp", "min_keep_expert"):
            check_whole(name, getattr(self, name), smallest=0)
        if self.layer_end is not None:
            check_whole("layer_end", self.layer_end, smallest=0)
        check_whole("align", self.align)
        if self.shape not in SHAPES:
            raise OptionError(f"`shape` {self.shape!r} is unknown; choose one of {', '.join(SHAPES)}")

    def of(self, geometry: Geometry) -> ModelConstraints:
        """The same for a model, with everything that was left to it decided.

        Args:
            geometry: shape of the model.

        Raises:
            OptionError: the model has no groups of an axis, or no class loads it in that shape.
        """
        mixture = geometry.family.mixture is not None
        shape = self.shape if self.shape != "auto" else "uniform" if mixture else "ragged"
        left = AXES if not mixture else geometry.axes if shape == "depth" else ("expert",)
        axes: tuple[Axis, ...] = left if self.axes is None else self.axes
        if missing := [axis for axis in axes if axis not in geometry.axes]:
            raise OptionError(
                f"`axes` has {missing[0]}, of which {geometry.family.title} has no groups; it has "
                f"{', '.join(geometry.axes)}"
            )
        # Unequal layers were measured to gain too little for classes that no other program loads: benchmarks/LOG.md.
        if mixture and shape == "ragged":
            raise OptionError(
                "`shape=ragged`: no class loads a mixture of experts whose layers differ; choose uniform or depth"
            )
        if mixture and shape == "depth" and set(axes) != set(geometry.axes):
            raise OptionError(
                f"`shape=depth` removes whole layers of a mixture of experts, with all of {', '.join(geometry.axes)}; "
                "leave out axes"
            )
        # A layer that goes as a whole needs no experts any more.
        least = 0 if shape == "depth" else geometry.least("expert")
        return ModelConstraints(**{**self.__dict__, "axes": axes, "shape": shape, "experts_needed": least})

    def min_keep(self, axis: Axis) -> int:
        """Groups of an axis that every layer keeps at least, as was asked."""
        if axis == "expert":
            return self.min_keep_expert
        return self.min_keep_attention if axis == "attention" else self.min_keep_mlp

    def bundle(self, block: Block, groups: int) -> int:
        """Of a block that has so many groups, kept numbers of groups are multiples of this."""
        if block.indivisible:
            return max(groups, 1)
        return self.align if block.axis == "mlp" else 1

    def layers(self, num_layers: int) -> range:
        """The decoder layers that may be cut.

        Raises:
            OptionError: the layer range is empty or lies outside the model.
        """
        end = num_layers if self.layer_end is None else self.layer_end
        if not 0 <= self.layer_start < end <= num_layers:
            raise OptionError(
                f"`layer_start` {self.layer_start} and `layer_end` {end} are no range of the {num_layers} layers"
            )
        return range(self.layer_start, end)


@dataclass(frozen=True)
class ModelConstraints(Constraints):
    """Constraints for one model: axes and shape are decided.

    Attributes:
        experts_needed: experts that every layer that has any keeps, whatever was asked.
    """

    axes: tuple[Axis, ...] = AXES
    shape: Shape = "ragged"
    experts_needed: int = 0

    def least(self, axis: Axis) -> int:
        """Groups of an axis that every layer keeps at least: as was asked, and as the model needs."""
        return max(self.min_keep(axis), self.experts_needed if axis == "expert" else 0)
