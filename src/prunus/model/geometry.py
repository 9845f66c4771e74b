"""The geometry of groups: which rows and columns of each weight belong to a group, and what cutting it saves.

An attention group is one key/value head with all query heads that read it; an MLP group is one channel. Group `k` of a
layer owns `unit(space)` consecutive indices of every dimension that carries one of the axis' spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache

from prunus.errors import PlanError, UnsupportedModelError
from prunus.files.json_file import Count, FileContent, check_content
from prunus.model.families import AXES, FAMILIES, Axis, Family, Projection, Space, family_of
from prunus.model.kind import causal_language_model

__all__ = ["SPACE_AXIS", "Geometry", "LayerWidths", "layer_widths_of", "submodule"]

#: the axis that cuts a space; `residual` is never cut
SPACE_AXIS: dict[Space, Axis] = {"query": "attention", "key_value": "attention", "channel": "mlp"}


@dataclass(frozen=True)
class LayerWidths:
    """How many groups a decoder layer has on each axis; 0 means the block is not there."""

    num_key_value_heads: int
    intermediate_size: int

    def __getitem__(self, axis: Axis) -> int:
        """Number of groups on an axis."""
        return self.num_key_value_heads if axis == "attention" else self.intermediate_size


class _OfAxes(FileContent):
    attention: Count
    mlp: Count


class _GeometryContent(FileContent):
    model_type: str
    hidden_size: Count
    head_dim: Count
    num_key_value_groups: Count
    vocab_size: Count
    layers: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    windows: list[Count | None]
    total_parameters: Count
    group_parameters: _OfAxes
    block_parameters: _OfAxes


@dataclass(frozen=True)
class Geometry:
    """Shape of a model in groups, and the number of parameters each group costs.

    Attributes:
        family: the family the model belongs to.
        hidden_size: width of the residual stream.
        head_dim: width of one head.
        num_key_value_groups: query heads per key/value head.
        vocab_size: rows of the head.
        widths: groups per axis of every decoder layer.
        windows: per decoder layer the sliding window of its attention, a token itself included; None where it sees all.
        total_parameters: all parameters of the model, tied embeddings counted once.
        group_parameters: parameters of one group of each axis.
        block_parameters: parameters that leave only with a whole block: its norms, output bias and per-head norms.
    """

    family: Family
    hidden_size: int
    head_dim: int
    num_key_value_groups: int
    vocab_size: int
    widths: tuple[LayerWidths, ...]
    windows: tuple[int | None, ...]
    total_parameters: int
    group_parameters: Mapping[Axis, int] = field(hash=False)
    block_parameters: Mapping[Axis, int] = field(hash=False)

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
        config: Any = model.config
        family = family_of(config)
        widths = layer_widths_of(config)
        hidden_size = int(config.hidden_size)
        head_dim = int(getattr(config, "head_dim", None) or hidden_size // config.num_attention_heads)
        try:
            layers = submodule(model, family.layers)
        except AttributeError:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no {family.layers!r}, where the family {family.model_type!r} keeps its "
                "decoder layers. Give a causal language model (AutoModelForCausalLM), with adapters merged into it."
            ) from None
        if len(layers) != len(widths):
            raise UnsupportedModelError(
                f"the config describes {len(widths)} decoder layers, the model has {len(layers)}"
            )
        geometry = cls(
            family=family,
            hidden_size=hidden_size,
            head_dim=head_dim,
            num_key_value_groups=int(config.num_attention_heads) // int(config.num_key_value_heads),
            vocab_size=int(config.vocab_size),
            widths=widths,
            windows=_windows_of(config),
            total_parameters=sum(p.numel() for p in model.parameters()),
            group_parameters={},
            block_parameters={},
        )
        group_parameters: dict[Axis, int] = dict.fromkeys(AXES, 0)
        block_parameters: dict[Axis, int] = dict.fromkeys(AXES, 0)
        for layer_idx, layer in enumerate(layers):
            geometry._check_layer(layer_idx, layer)
            for axis in AXES:
                groups = widths[layer_idx][axis]
                if groups:
                    block = family.block(axis)
                    in_groups = sum(
                        _parameters_in_groups(projection, submodule(layer, projection.path))
                        for projection in block.projections
                    )
                    modules = [submodule(layer, path) for path in (block.module, *block.norms)]
                    whole = sum(p.numel() for module in modules for p in module.parameters())
                    group_parameters[axis] = in_groups // groups
                    block_parameters[axis] = whole - in_groups
        return cls(**{**geometry.__dict__, "group_parameters": group_parameters, "block_parameters": block_parameters})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "model_type": self.family.model_type,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "num_key_value_groups": self.num_key_value_groups,
            "vocab_size": self.vocab_size,
            "layers": [[widths[axis] for axis in AXES] for widths in self.widths],
            "windows": list(self.windows),
            "total_parameters": self.total_parameters,
            "group_parameters": dict(self.group_parameters),
            "block_parameters": dict(self.block_parameters),
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
        geometry = cls(
            family=FAMILIES[content.model_type],
            hidden_size=content.hidden_size,
            head_dim=content.head_dim,
            num_key_value_groups=content.num_key_value_groups,
            vocab_size=content.vocab_size,
            widths=tuple(LayerWidths(*layer) for layer in content.layers),
            windows=tuple(content.windows),
            total_parameters=content.total_parameters,
            group_parameters={axis: getattr(content.group_parameters, axis) for axis in AXES},
            block_parameters={axis: getattr(content.block_parameters, axis) for axis in AXES},
        )
        if len(geometry.windows) != len(geometry.widths):
            raise PlanError(
                f"malformed model geometry: windows of {len(geometry.windows)} layers, widths of {len(geometry.widths)}"
            )
        for axis in AXES:
            if any(widths[axis] for widths in geometry.widths) and not geometry.group_parameters[axis]:
                raise PlanError(f"malformed model geometry: groups of {axis} without parameters")
        in_layers = geometry.total_parameters - geometry.parameters_left([LayerWidths(0, 0)] * len(geometry.widths))
        # Shares are of the total: with one that cannot be, every ratio would cut something else than it says.
        if not 0 < in_layers < geometry.total_parameters:
            raise PlanError(
                f"malformed model geometry: its layers have {in_layers:,} parameters, of {geometry.total_parameters:,}"
            )
        return geometry

    def unit(self, space: Space) -> int:
        """How many consecutive indices of a dimension one group owns."""
        if space == "query":
            return self.num_key_value_groups * self.head_dim
        return self.head_dim if space == "key_value" else 1

    def group_weights(self, axis: Axis) -> int:
        """Entries of the weight matrices that one group owns: its parameters without biases."""
        total = 0
        for projection in self.family.block(axis).projections:
            cut = projection.outputs if projection.inputs == "residual" else (projection.inputs,)
            total += sum(self.unit(space) for space in cut) * self.hidden_size
        return total

    def size(self, layer_idx: int, space: Space) -> int:
        """Width of a space in a layer."""
        if space == "residual":
            return self.hidden_size
        return self.widths[layer_idx][SPACE_AXIS[space]] * self.unit(space)

    def indices(self, groups: Sequence[int], space: Space) -> Tensor:
        """Indices that `groups` own in a dimension that carries `space`: int64, shape (len(groups) * unit,)."""
        starts = torch.as_tensor(groups, dtype=torch.int64)[:, None] * self.unit(space)
        return (starts + torch.arange(self.unit(space))).flatten()

    def output_parts(self, layer_idx: int, projection: Projection) -> Iterator[tuple[Space, int, int]]:
        """The row ranges of a projection's weight: `(space, first row, one past the last row)`."""
        start = 0
        for space in projection.outputs:
            stop = start + self.size(layer_idx, space)
            yield space, start, stop
            start = stop

    def sum_to_groups(self, layer_idx: int, axis: Axis, values: Mapping[str, Tensor]) -> Tensor:
        """Sum one value per weight to one value per group.

        Args:
            layer_idx: the decoder layer.
            axis: which groups.
            values: keyed by parameter name inside the decoder layer (`self_attn.q_proj.weight`, `….bias`), of the
                parameter's own shape. Parameters that are not given count as zero.

        Returns:
            float64 on the CPU, shape (groups,).
        """
        total = torch.zeros(self.widths[layer_idx][axis], dtype=torch.float64)
        for projection in self.family.block(axis).projections:
            for parameter in ("weight", "bias"):
                value = values.get(f"{projection.path}.{parameter}")
                if value is not None:
                    total += self.sum_projection_to_groups(layer_idx, axis, projection, value).cpu()
        return total

    def sum_projection_to_groups(
        self, layer_idx: int, axis: Axis, projection: Projection, values: Tensor, *, squared: bool = False
    ) -> Tensor:
        """Sum one value per weight, or per bias, of a single projection to one value per group of its block.

        Args:
            layer_idx: the decoder layer.
            axis: the axis of the projection's block.
            projection: whose weight or bias the values are of.
            values: of the parameter's shape.
            squared: sum the squares of the values instead, in one pass over them.

        Returns:
            float64 on the device of `values`, shape (groups,). The output bias of a block belongs to no group.
        """
        groups = self.widths[layer_idx][axis]
        total = torch.zeros(groups, dtype=torch.float64, device=values.device)
        for space, start, stop in self.output_parts(layer_idx, projection):
            if space in SPACE_AXIS:
                rows = values[start:stop]
                total += _sum_units(rows if rows.ndim == 1 else _sum_along(rows, 1, squared), groups, squared)
        if values.ndim == 2 and projection.inputs in SPACE_AXIS:
            total += _sum_units(_sum_along(values, 0, squared), groups, squared)
        return total

    def parameters_left(self, kept: Sequence[LayerWidths]) -> int:
        """Number of parameters once every layer keeps only `kept` groups.

        A block that keeps none leaves with its norm.
        """
        removed = 0
        for before, after in zip(self.widths, kept, strict=True):
            for axis in AXES:
                removed += (before[axis] - after[axis]) * self.group_parameters[axis]
                if before[axis] and not after[axis]:
                    removed += self.block_parameters[axis]
        return self.total_parameters - removed

    def _check_layer(self, layer_idx: int, layer: nn.Module) -> None:
        described = {projection.path for projection in self.family.projections}
        untouched = tuple(path for block in self.family.blocks for path in (*block.untouched, *block.norms))
        for path, module in layer.named_modules():
            leaf_with_weights = next(module.parameters(recurse=False), None) is not None
            if leaf_with_weights and path not in described and path not in untouched:
                raise UnsupportedModelError(
                    f"layer {layer_idx} holds {path!r} ({type(module).__name__}), which the family "
                    f"{self.family.model_type!r} does not describe; cutting around it could break the model. "
                    "Merge adapters first, or describe the module, as docs/extending.md shows."
                )
        for block in self.family.blocks:
            if self.widths[layer_idx][block.axis] == 0:
                continue
            for path in (*(projection.path for projection in block.projections), *block.norms):
                try:
                    submodule(layer, path)
                except AttributeError:
                    raise UnsupportedModelError(
                        f"layer {layer_idx} has no {path!r}, which the family {self.family.model_type!r} describes"
                    ) from None
            for projection in block.projections:
                self._check_projection(layer_idx, layer, projection)

    def _check_projection(self, layer_idx: int, layer: nn.Module, projection: Projection) -> None:
        module = submodule(layer, projection.path)
        if type(module) is not nn.Linear:
            raise UnsupportedModelError(
                f"layer {layer_idx}: {projection.path} is a {type(module).__name__}, not a plain torch.nn.Linear. "
                "Quantised weights and adapters cannot be cut: load in bf16 or fp32, and merge adapters first."
            )
        rows = sum(self.size(layer_idx, space) for space in projection.outputs)
        columns = self.size(layer_idx, projection.inputs)
        if tuple(module.weight.shape) != (rows, columns):
            raise UnsupportedModelError(
                f"layer {layer_idx}: {projection.path}.weight has shape {tuple(module.weight.shape)}, "
                f"the config implies {(rows, columns)}"
            )


def layer_widths_of(config: Any) -> tuple[LayerWidths, ...]:
    """Groups per layer, from the config of a stock model or of one that prunus wrote."""
    per_layer = getattr(config, "layer_widths", None)
    if per_layer is None:
        widths = LayerWidths(int(config.num_key_value_heads), int(config.intermediate_size))
        return (widths,) * int(config.num_hidden_layers)
    return tuple(LayerWidths(int(w["num_key_value_heads"]), int(w["intermediate_size"])) for w in per_layer)


def _windows_of(config: Any) -> tuple[int | None, ...]:
    """Sliding windows per layer. Which layers slide is transformers' decision; an empty cache holds no memory."""
    kinds = DynamicCache(config=config).layers
    return tuple(int(kind.sliding_window) if kind.is_sliding else None for kind in kinds)


def submodule(model: nn.Module, path: str) -> Any:
    """`model.get_submodule(path)`, typed loosely: lists of layers and linear modules come out of it alike."""
    return model.get_submodule(path)


def _sum_along(values: Tensor, dim: int, squared: bool) -> Tensor:
    """Sums along a dimension; with `squared`, roots of the sums of squares, which `_sum_units` squares again."""
    return torch.linalg.vector_norm(values, dim=dim) if squared else values.sum(dim=dim)


def _sum_units(values: Tensor, groups: int, squared: bool) -> Tensor:
    if not groups:
        return values.new_zeros(0, dtype=torch.float64)
    units = values.double().reshape(groups, -1)
    return (units.square() if squared else units).sum(dim=1)


def _parameters_in_groups(projection: Projection, module: nn.Linear) -> int:
    if projection.outputs == ("residual",):
        return module.weight.numel()
    return sum(parameter.numel() for parameter in module.parameters())
