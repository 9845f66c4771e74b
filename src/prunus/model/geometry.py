"""The geometry of groups: what belongs to each, and how many parameters cutting it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from prunus.errors import PlanError, UnsupportedModelError
from prunus.files.json_file import Count, FileContent, check_content
from prunus.model.dimensions import Dimensions
from prunus.model.families import FAMILIES, Axis, Block, Projection, Stack
from prunus.model.kind import causal_language_model
from prunus.model.layer_check import check_layer
from prunus.model.modules import is_in, submodule, tensor_of
from prunus.model.widths import LayerWidths

__all__ = ["Geometry"]


class _GeometryContent(FileContent):
    model_type: str
    hidden_size: Count
    head_dim: Count
    num_key_value_groups: Count
    vocab_size: Count
    layers: list[Annotated[list[Count], Field(min_length=2, max_length=3)]]
    windows: list[Count | None]
    total_parameters: Count
    group_parameters: dict[str, Count]
    block_parameters: dict[str, Count]
    experts_per_token: Count = 0
    beside_experts: dict[str, Count] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Geometry(Dimensions):
    """Shape of a model in groups, and the number of parameters each group costs.

    Attributes:
        total_parameters: all parameters of the model, tied embeddings counted once.
        group_parameters: parameters of one group of each axis.
        block_parameters: parameters that leave only with a whole block: its norms, output bias and per-head norms.
        beside_experts: as `block_parameters`, in layers with experts.
    """

    total_parameters: int
    group_parameters: Mapping[Axis, int] = field(hash=False)
    block_parameters: Mapping[Axis, int] = field(hash=False)
    beside_experts: Mapping[Axis, int] = field(default_factory=dict, hash=False)

    def leaves_with_block(self, layer_idx: int, axis: Axis) -> int:
        """Parameters of a block that belong to none of its groups, and leave with the last one."""
        kind = self.beside_experts if self.widths[layer_idx].num_experts else self.block_parameters
        return kind.get(axis, 0)

    @property
    def active_parameters(self) -> int:
        """Parameters that work on each token: all but the experts that it does not go to."""
        return self.active_parameters_left(self.widths)

    def active_parameters_left(self, kept: Sequence[LayerWidths]) -> int:
        """The same once every layer keeps only `kept` groups."""
        idle = sum(max(0, layer.num_experts - self.experts_per_token) for layer in kept)
        return self.parameters_left(kept) - idle * self.group_parameters.get("expert", 0)

    @classmethod
    def of(cls, model: Any) -> Geometry:
        """Read the geometry off a model (its weights may be on the meta device) and check it against its family.

        Args:
            model: a transformers causal language model.

        Raises:
            UnsupportedModelError: the model is of another kind, see `causal_language_model`; a described module is
                missing or has an unexpected type or shape, or a decoder layer holds a linear module that the family
                does not describe.
        """
        model = causal_language_model(model)
        dimensions = Dimensions.of_config(model.config)
        family = dimensions.family
        try:
            layers = submodule(model, family.layers)
        except AttributeError:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no {family.layers!r}, where the family {family.model_type!r} keeps its "
                "decoder layers. Give a causal language model (AutoModelForCausalLM), with adapters merged into it."
            ) from None
        if len(layers) != len(dimensions.widths):
            raise UnsupportedModelError(
                f"the config describes {len(dimensions.widths)} decoder layers, the model has {len(layers)}"
            )
        group_parameters: dict[Axis, int] = dict.fromkeys(family.axes, 0)
        block_parameters: dict[Axis, int] = dict.fromkeys(family.axes, 0)
        beside_experts: dict[Axis, int] = {}
        for layer_idx, (layer, widths) in enumerate(zip(layers, dimensions.widths, strict=True)):
            check_layer(dimensions, layer_idx, layer)
            for block in dimensions.blocks(layer_idx):
                groups = widths[block.axis]
                if groups:
                    in_groups = sum(
                        _parameters_in_groups(projection, submodule(layer, projection.path))
                        for projection in block.projections
                    ) + sum(_parameters_in(layer, stack) for stack in block.stacks)
                    group_parameters[block.axis] = in_groups // groups
                    kind = beside_experts if widths.num_experts else block_parameters
                    kind[block.axis] = _parameters_of(dimensions, layer_idx, layer, block) - in_groups
        return cls(
            **vars(dimensions),
            total_parameters=sum(parameter.numel() for parameter in model.parameters()),
            group_parameters=group_parameters,
            block_parameters=block_parameters,
            beside_experts=beside_experts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "model_type": self.family.model_type,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "num_key_value_groups": self.num_key_value_groups,
            "vocab_size": self.vocab_size,
            "layers": [[widths[axis] for axis in self.axes] for widths in self.widths],
            "windows": list(self.windows),
            "total_parameters": self.total_parameters,
            "group_parameters": dict(self.group_parameters),
            "block_parameters": dict(self.block_parameters),
            **({"experts_per_token": self.experts_per_token} if self.experts_per_token else {}),
            **({"beside_experts": dict(self.beside_experts)} if self.beside_experts else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """Inverse of `to_dict`.

        Raises:
            PlanError: fields are missing or malformed.
        """
        content = check_content(_GeometryContent, values, "malformed model geometry", PlanError)
        if content.model_type not in FAMILIES:
            raise PlanError(f"malformed model geometry: model_type is {content.model_type!r}, no family that is known")
        family = FAMILIES[content.model_type]
        for name in ("group_parameters", "block_parameters"):
            if not set(family.axes) <= getattr(content, name).keys():
                raise PlanError(f"malformed model geometry: {name} must name {', '.join(family.axes)}")
        if any(len(layer) != len(family.axes) for layer in content.layers):
            raise PlanError(f"malformed model geometry: layers must say how many groups of {', '.join(family.axes)}")
        geometry = cls(
            family=family,
            hidden_size=content.hidden_size,
            head_dim=content.head_dim,
            num_key_value_groups=content.num_key_value_groups,
            vocab_size=content.vocab_size,
            widths=tuple(LayerWidths.of(dict(zip(family.axes, layer, strict=True))) for layer in content.layers),
            windows=tuple(content.windows),
            total_parameters=content.total_parameters,
            group_parameters={axis: content.group_parameters[axis] for axis in family.axes},
            block_parameters={axis: content.block_parameters[axis] for axis in family.axes},
            experts_per_token=content.experts_per_token,
            beside_experts={axis: n for axis in family.axes if (n := content.beside_experts.get(axis)) is not None},
        )
        if len(geometry.windows) != len(geometry.widths):
            raise PlanError(
                f"malformed model geometry: windows of {len(geometry.windows)} layers, widths of {len(geometry.widths)}"
            )
        for axis in family.axes:
            if any(widths[axis] for widths in geometry.widths) and not geometry.group_parameters[axis]:
                raise PlanError(f"malformed model geometry: groups of {axis} without parameters")
        in_layers = geometry.total_parameters - geometry.parameters_left([LayerWidths(0, 0)] * len(geometry.widths))
        # Shares are of the total: with one that cannot be, every ratio would cut something else than it says.
        if not 0 < in_layers < geometry.total_parameters:
            raise PlanError(
                f"malformed model geometry: its layers have {in_layers:,} parameters, of {geometry.total_parameters:,}"
            )
        return geometry

    def parameters_left(self, kept: Sequence[LayerWidths]) -> int:
        """Number of parameters once every layer keeps only `kept` groups.

        A block that keeps none leaves with its norm.
        """
        removed = 0
        for layer_idx, (before, after) in enumerate(zip(self.widths, kept, strict=True)):
            for axis in self.axes:
                removed += (before[axis] - after[axis]) * self.group_parameters[axis]
                if before[axis] and not after[axis]:
                    removed += self.leaves_with_block(layer_idx, axis)
        return self.total_parameters - removed


def _parameters_of(dimensions: Dimensions, layer_idx: int, layer: nn.Module, block: Block) -> int:
    """Parameters of a block and its norms, without those of a block inside its module."""
    inside = [other.module for other in dimensions.blocks(layer_idx) if other.module.startswith(block.module + ".")]
    inside += [path for other in dimensions.blocks(layer_idx) if other.module in inside for path in other.untouched]
    places = (block.module, *block.norms, *block.untouched)
    return sum(
        parameter.numel()
        for name, parameter in layer.named_parameters()
        if is_in(name, places) and not is_in(name, inside)
    )


def _parameters_in(layer: nn.Module, stack: Stack) -> int:
    """Parameters of a stack: none where it is a buffer."""
    tensor = tensor_of(layer, stack)
    return tensor.numel() if isinstance(tensor, nn.Parameter) else 0


def _parameters_in_groups(projection: Projection, module: nn.Linear) -> int:
    if projection.outputs == ("residual",):
        return module.weight.numel()
    return sum(parameter.numel() for parameter in module.parameters())
