"""The geometry of groups: which rows and columns of each weight belong to a group, and what cutting it saves.

An attention group is one key/value head with all query heads that read it; an MLP group is one channel; an expert of a
mixture is a group. Group `k` of a layer owns `unit(space)` consecutive indices of every dimension that carries one of
the axis' spaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache

from prunus.errors import PlanError, UnsupportedModelError
from prunus.files.json_file import Count, FileContent, check_content
from prunus.model.families import FAMILIES, Axis, Block, Family, Projection, Space, Stack, family_of
from prunus.model.kind import causal_language_model

__all__ = ["SPACE_AXIS", "Geometry", "LayerWidths", "layer_widths_of", "submodule"]

#: the axis that cuts a space; `residual` is never cut
SPACE_AXIS: dict[Space, Axis] = {
    "query": "attention",
    "key_value": "attention",
    "head": "attention",
    "channel": "mlp",
    "expert": "expert",
}


@dataclass(frozen=True)
class LayerWidths:
    """How many groups a decoder layer has on each axis; 0 means the block is not there.

    In a layer with experts, `intermediate_size` is the width of the shared ones.
    """

    num_key_value_heads: int
    intermediate_size: int
    num_experts: int = 0

    @classmethod
    def of(cls, groups: Mapping[Axis, int]) -> LayerWidths:
        """From the number of groups on each axis; an axis that is not named has none."""
        return cls(groups.get("attention", 0), groups.get("mlp", 0), groups.get("expert", 0))

    def __getitem__(self, axis: Axis) -> int:
        """Number of groups on an axis."""
        if axis == "expert":
            return self.num_experts
        return self.num_key_value_heads if axis == "attention" else self.intermediate_size

    def __bool__(self) -> bool:
        """Whether any block is there."""
        return bool(self.num_key_value_heads or self.intermediate_size or self.num_experts)

    def __str__(self) -> str:
        """As messages say it."""
        experts = f" and {self.num_experts} experts" if self.num_experts else ""
        return f"{self.num_key_value_heads} attention groups, {self.intermediate_size} channels{experts}"


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
        experts_per_token: how many experts each token goes to; 0 without experts.
        beside_experts: as `block_parameters`, in layers with experts.
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
    experts_per_token: int = 0
    beside_experts: Mapping[Axis, int] = field(default_factory=dict, hash=False)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The kinds of group that the family's layers consist of."""
        return self.family.axes

    def blocks(self, layer_idx: int) -> tuple[Block, ...]:
        """The blocks of a layer's kind, in the order in which it runs them; some may have no groups left."""
        return self.family.blocks_of(self.widths[layer_idx].num_experts)

    def block(self, layer_idx: int, axis: Axis) -> Block | None:
        """The block of an axis in a layer; None where layers of its kind have none."""
        return next((block for block in self.blocks(layer_idx) if block.axis == axis), None)

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
        config: Any = model.config
        family = family_of(config)
        _check_routing(config, family)
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
            experts_per_token=int(config.num_experts_per_tok) if family.mixture else 0,
        )
        group_parameters: dict[Axis, int] = dict.fromkeys(family.axes, 0)
        block_parameters: dict[Axis, int] = dict.fromkeys(family.axes, 0)
        beside_experts: dict[Axis, int] = {}
        for layer_idx, layer in enumerate(layers):
            geometry._check_layer(layer_idx, layer)
            for block in geometry.blocks(layer_idx):
                groups = widths[layer_idx][block.axis]
                if groups:
                    in_groups = sum(
                        _parameters_in_groups(projection, submodule(layer, projection.path))
                        for projection in block.projections
                    ) + sum(_parameters_in(layer, stack) for stack in block.stacks)
                    group_parameters[block.axis] = in_groups // groups
                    kind = beside_experts if widths[layer_idx].num_experts else block_parameters
                    kind[block.axis] = geometry._parameters_of(layer_idx, layer, block) - in_groups
        found = {
            "group_parameters": group_parameters,
            "block_parameters": block_parameters,
            "beside_experts": beside_experts,
        }
        return cls(**{**geometry.__dict__, **found})

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

    def unit(self, space: Space) -> int:
        """How many consecutive indices of a dimension one group owns."""
        if space == "query":
            return self.num_key_value_groups * self.head_dim
        if space == "head":
            return self.num_key_value_groups
        return self.head_dim if space == "key_value" else 1

    def group_weights(self, axis: Axis) -> int:
        """Entries of the weight matrices that one attention group or channel owns: its parameters without biases."""
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
            values: keyed by parameter name inside the decoder layer (`self_attn.q_proj.weight`, `….bias`, the path of a
                stack), of the parameter's own shape. Parameters that are not given count as zero.

        Returns:
            float64 on the CPU, shape (groups,).
        """
        total = torch.zeros(self.widths[layer_idx][axis], dtype=torch.float64)
        block = self.block(layer_idx, axis)
        if block is None or not len(total):
            return total
        for projection in block.projections:
            for parameter in ("weight", "bias"):
                value = values.get(f"{projection.path}.{parameter}")
                if value is not None:
                    total += self.sum_projection_to_groups(layer_idx, axis, projection, value).cpu()
        for stack in block.stacks:
            value = values.get(stack.path)
            if value is not None:
                entries = value.movedim(stack.dim, 0).reshape(len(total), -1)
                total += entries.sum(dim=1, dtype=torch.float64).cpu()
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
        for layer_idx, (before, after) in enumerate(zip(self.widths, kept, strict=True)):
            for axis in self.axes:
                removed += (before[axis] - after[axis]) * self.group_parameters[axis]
                if before[axis] and not after[axis]:
                    removed += self.leaves_with_block(layer_idx, axis)
        return self.total_parameters - removed

    def least(self, axis: Axis) -> int:
        """How many groups of an axis a layer needs where it has any: as many experts as each token goes to."""
        return self.experts_per_token if axis == "expert" else 0

    def _parameters_of(self, layer_idx: int, layer: nn.Module, block: Block) -> int:
        """Parameters of a block and its norms, without those of a block inside its module."""
        inside = [other.module for other in self.blocks(layer_idx) if other.module.startswith(block.module + ".")]
        inside += [path for other in self.blocks(layer_idx) if other.module in inside for path in other.untouched]
        places = (block.module, *block.norms, *block.untouched)
        return sum(
            parameter.numel()
            for name, parameter in layer.named_parameters()
            if _is_in(name, places) and not _is_in(name, inside)
        )

    def _check_layer(self, layer_idx: int, layer: nn.Module) -> None:
        blocks = self.blocks(layer_idx)
        described = {projection.path for block in blocks for projection in block.projections}
        untouched = tuple(path for block in blocks for path in (*block.untouched, *block.norms))
        stacks = {stack.path for block in blocks for stack in block.stacks}
        for path, module in layer.named_modules():
            own = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
            if own - stacks and path not in described and path not in untouched:
                raise UnsupportedModelError(
                    f"layer {layer_idx} holds {path!r} ({type(module).__name__}), which the family "
                    f"{self.family.model_type!r} does not describe; cutting around it could break the model. "
                    "Merge adapters first, or describe the module, as docs/extending.md shows."
                )
        for block in blocks:
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
            for stack in block.stacks:
                self._check_stack(layer_idx, layer, stack)

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

    def _check_stack(self, layer_idx: int, layer: nn.Module, stack: Stack) -> None:
        tensor = _tensor_of(layer, stack)
        if tensor is None:
            raise UnsupportedModelError(
                f"layer {layer_idx} has no {stack.path!r}, which the family {self.family.model_type!r} describes. "
                "Quantised weights cannot be cut: load in bf16 or fp32"
            )
        if (found := tensor.shape[stack.dim]) != (expected := self.size(layer_idx, stack.space)):
            raise UnsupportedModelError(
                f"layer {layer_idx}: {stack.path} has shape {tuple(tensor.shape)}, {found} entries where the config "
                f"implies {expected}"
            )


def layer_widths_of(config: Any) -> tuple[LayerWidths, ...]:
    """Groups per layer, from the config of a stock model or of one that prunus wrote."""
    per_layer = getattr(config, "layer_widths", None)
    if per_layer is None:
        heads, mixture = int(config.num_key_value_heads), family_of(config).mixture
        if mixture is None:
            return (LayerWidths(heads, int(config.intermediate_size)),) * int(config.num_hidden_layers)
        experts, shared = int(getattr(config, mixture.count)), mixture.shared_channels(config)
        return tuple(
            LayerWidths(heads, shared, experts)
            if mixture.in_layer(config, layer_idx)
            else LayerWidths(heads, int(config.intermediate_size))
            for layer_idx in range(int(config.num_hidden_layers))
        )
    return tuple(
        LayerWidths(int(w["num_key_value_heads"]), int(w["intermediate_size"]), int(w.get("num_experts", 0)))
        for w in per_layer
    )


def _check_routing(config: Any, family: Family) -> None:
    """Raise unless the numbers that routing goes by belong together, and routing is of a kind that can be cut.

    Raises:
        UnsupportedModelError: more experts per token than there are, or routing by groups of experts.
    """
    if family.mixture is None:
        return
    experts, chosen = getattr(config, family.mixture.count), config.num_experts_per_tok
    if not 1 <= chosen <= experts:
        raise UnsupportedModelError(
            f"the config sends each token to {chosen} of {experts} experts; correct num_experts_per_tok or "
            f"{family.mixture.count}"
        )
    field_of_groups = family.mixture.routing_groups
    if field_of_groups and (groups := getattr(config, field_of_groups)) != 1:
        raise UnsupportedModelError(
            f"the model routes by {groups} groups of experts ({field_of_groups}), whose experts stay or go together; "
            f"prunus cuts mixtures without such groups ({field_of_groups} 1), as GLM-4.5 is"
        )


def _tensor_of(layer: nn.Module, stack: Stack) -> Tensor | None:
    """The parameter or buffer that a stack names; None where there is none."""
    module, _, name = stack.path.rpartition(".")
    try:
        found = getattr(layer.get_submodule(module), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _parameters_in(layer: nn.Module, stack: Stack) -> int:
    """Parameters of a stack: none where it is a buffer."""
    tensor = _tensor_of(layer, stack)
    return tensor.numel() if isinstance(tensor, nn.Parameter) else 0


def _is_in(name: str, places: Iterable[str]) -> bool:
    """Whether a parameter is that of a path, or of a module there."""
    return any(name == place or name.startswith(place + ".") for place in places)


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
