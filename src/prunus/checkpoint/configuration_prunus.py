"""Configurations of models whose decoder layers differ in width.

This file travels with every checkpoint of such a model, so it must import nothing but transformers and
huggingface_hub. A configuration is the family's own one plus the field `layer_widths`, one entry per decoder layer:

    {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}

Zero means that the block (attention, or MLP) is absent from the layer. The fields of the same names on the
configuration itself keep the values of the dense model; `head_dim` is always explicit, so that no reader derives it
from them.
"""

from __future__ import annotations

import copy
from dataclasses import is_dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

WIDTH_FIELDS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def strict_if_dataclass(cls: type) -> type:
    """`huggingface_hub.dataclasses.strict`, where configurations are dataclasses (transformers 5), else no change.

    Without it transformers 5 keeps running the validators of the stock class instead of the ones overridden here.
    """
    return strict(cls) if is_dataclass(cls) else cls


class LayerWidthsMixin:
    """Adds `layer_widths` to a family's configuration.

    Attributes:
        layer_widths: one dict per decoder layer with the keys `num_attention_heads`, `num_key_value_heads` and
            `intermediate_size`; 0 where the block is absent. None means that all layers have the dense widths.
    """

    # Head counts that differ by layer are not divisible by a tensor-parallel size in general.
    base_model_tp_plan = None
    # `save_pretrained` copies this file next to the weights, as it does for any code that is not in transformers.
    _auto_class = "AutoConfig"

    def __init__(self, *, layer_widths: list[dict[str, int]] | None = None, **kwargs: Any):
        # Only transformers 4 comes here: from 5 on a configuration is a dataclass, whose __init__ is generated. What 5
        # writes as `rope_parameters`, 4 reads from two fields, with a default that would go unnoticed.
        rope_parameters = kwargs.get("rope_parameters") or {}
        if "rope_theta" in rope_parameters:
            kwargs.setdefault("rope_theta", rope_parameters["rope_theta"])
        if rope_parameters.get("rope_type", "default") != "default":
            kwargs.setdefault("rope_scaling", rope_parameters)
        super().__init__(**kwargs)
        self.layer_widths = layer_widths
        self._complete()

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self._complete()

    def _complete(self: Any) -> None:
        if getattr(self, "head_dim", None) is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_widths is None:
            dense = {field: getattr(self, field) for field in WIDTH_FIELDS}
            self.layer_widths = [dict(dense) for _ in range(self.num_hidden_layers)]
        self.layer_widths = [{field: int(widths[field]) for field in WIDTH_FIELDS} for widths in self.layer_widths]
        # Where to find the classes without the prunus package. Written afresh, so that a checkpoint that was fetched
        # from the Hub and is saved again points at its own copy of the code.
        stem = type(self).__name__.removesuffix("Config")
        self.auto_map = {
            "AutoConfig": f"configuration_prunus.{stem}Config",
            "AutoModel": f"modeling_prunus.{stem}Model",
            "AutoModelForCausalLM": f"modeling_prunus.{stem}ForCausalLM",
        }
        self.validate_architecture()

    def validate_architecture(self: Any) -> None:
        """Check `layer_widths`; the stock check of hidden size against the number of heads does not apply.

        Raises:
            ValueError: `layer_widths` has another length than `num_hidden_layers`, or a layer's query heads are not
                the same multiple of its key/value heads as in the dense model.
        """
        if len(self.layer_widths) != self.num_hidden_layers:
            raise ValueError(
                f"layer_widths describes {len(self.layer_widths)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}; they must agree"
            )
        num_key_value_groups = self.num_attention_heads // self.num_key_value_heads
        for layer_idx, widths in enumerate(self.layer_widths):
            if min(widths.values()) < 0:
                raise ValueError(f"layer_widths[{layer_idx}] = {widths} has a negative width")
            if widths["num_attention_heads"] != widths["num_key_value_heads"] * num_key_value_groups:
                raise ValueError(
                    f"layer_widths[{layer_idx}] = {widths}: every key/value head must serve {num_key_value_groups} "
                    "query heads, as in the dense model"
                )

    def layer_config(self: Any, layer_idx: int) -> Any:
        """A copy of this configuration whose global widths are those of one layer.

        An absent block gets the smallest width that the stock classes can build; the model replaces it anyway.
        """
        narrow = copy.copy(self)
        widths = self.layer_widths[layer_idx]
        num_key_value_heads = widths["num_key_value_heads"] or 1
        narrow.num_key_value_heads = num_key_value_heads
        narrow.num_attention_heads = num_key_value_heads * (self.num_attention_heads // self.num_key_value_heads)
        narrow.intermediate_size = widths["intermediate_size"] or 1
        return narrow


@strict_if_dataclass
class PrunusLlamaConfig(LayerWidthsMixin, LlamaConfig):
    """Llama with one set of widths per decoder layer."""

    model_type = "prunus_llama"
    layer_widths: list[dict[str, int]] | None = None


@strict_if_dataclass
class PrunusMistralConfig(LayerWidthsMixin, MistralConfig):
    """Mistral with one set of widths per decoder layer."""

    model_type = "prunus_mistral"
    layer_widths: list[dict[str, int]] | None = None


@strict_if_dataclass
class PrunusQwen2Config(LayerWidthsMixin, Qwen2Config):
    """Qwen2 with one set of widths per decoder layer."""

    model_type = "prunus_qwen2"
    layer_widths: list[dict[str, int]] | None = None


@strict_if_dataclass
class PrunusQwen3Config(LayerWidthsMixin, Qwen3Config):
    """Qwen3 with one set of widths per decoder layer."""

    model_type = "prunus_qwen3"
    layer_widths: list[dict[str, int]] | None = None


__all__ = ["PrunusLlamaConfig", "PrunusMistralConfig", "PrunusQwen2Config", "PrunusQwen3Config"]
