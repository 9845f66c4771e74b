"""How many groups each layer has, as the config says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache

from prunus.errors import UnsupportedModelError
from prunus.model.families import Axis, Family, family_of

__all__ = ["LayerWidths", "check_routing", "layer_widths_of", "windows_of"]


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


def check_routing(config: Any, family: Family) -> None:
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


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Sliding windows per layer. Which layers slide is transformers' decision; an empty cache holds no memory."""
    kinds = DynamicCache(config=config).layers
    return tuple(int(kind.sliding_window) if kind.is_sliding else None for kind in kinds)
