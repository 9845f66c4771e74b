"""Which rows and columns of each weight belong to a group.

An attention group is one key/value head with all query heads that read it; an MLP group is one channel; an expert of a
mixture is a group. Group `k` of a layer owns `unit(space)` consecutive indices of every dimension that carries one of
the axis' spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.model.families import Axis, Block, Family, Projection, Space, family_of
from prunus.model.widths import LayerWidths, check_routing, layer_widths_of, windows_of

__all__ = ["SPACE_AXIS", "Dimensions"]

#: the axis that cuts a space; `residual` is never cut
SPACE_AXIS: dict[Space, Axis] = {
    "query": "attention",
    "key_value": "attention",
    "head": "attention",
    "channel": "mlp",
    "expert": "expert",
}


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Shape of a model in groups, as its config describes it.

    Attributes:
        family: the family the model belongs to.
        hidden_size: width of the residual stream.
        head_dim: width of one head.
        num_key_value_groups: query heads per key/value head.
        vocab_size: rows of the head.
        widths: groups per axis of every decoder layer.
        windows: per decoder layer the sliding window of its attention, a token itself included; None where it sees all.
        experts_per_token: how many experts each token goes to; 0 without experts.
    """

    family: Family
    hidden_size: int
    head_dim: int
    num_key_value_groups: int
    vocab_size: int
    widths: tuple[LayerWidths, ...]
    windows: tuple[int | None, ...]
    experts_per_token: int = 0

    @classmethod
    def of_config(cls, config: Any) -> Dimensions:
        """Read them from a config.

        Raises:
            UnsupportedModelError: the family is unknown, or its routing cannot be cut.
        """
        family = family_of(config)
        check_routing(config, family)
        hidden_size = int(config.hidden_size)
        return Dimensions(
            family=family,
            hidden_size=hidden_size,
            head_dim=int(getattr(config, "head_dim", None) or hidden_size // config.num_attention_heads),
            num_key_value_groups=int(config.num_attention_heads) // int(config.num_key_value_heads),
            vocab_size=int(config.vocab_size),
            widths=layer_widths_of(config),
            windows=windows_of(config),
            experts_per_token=int(config.num_experts_per_tok) if family.mixture else 0,
        )

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

    def least(self, axis: Axis) -> int:
        """How many groups of an axis a layer needs where it has any: as many experts as each token goes to."""
        return self.experts_per_token if axis == "expert" else 0


def _sum_along(values: Tensor, dim: int, squared: bool) -> Tensor:
    """Sums along a dimension; with `squared`, roots of the sums of squares, which `_sum_units` squares again."""
    return torch.linalg.vector_norm(values, dim=dim) if squared else values.sum(dim=dim)


def _sum_units(values: Tensor, groups: int, squared: bool) -> Tensor:
    if not groups:
        return values.new_zeros(0, dtype=torch.float64)
    units = values.double().reshape(groups, -1)
    return (units.square() if squared else units).sum(dim=1)
