"""Configurations of models whose decoder layers differ in width.

This file travels with every checkpoint of such a model, so it must import nothing but transformers and
huggingface_hub. A configuration is the family's own one plus the field `layer_widths`, one entry per decoder layer:

    {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}

Zero means that the block (attention, or MLP) is absent from the layer. The fields of the same names on the
configuration itself keep the values of the dense model; `head_dim` is always explicit, so that no reader derives it
from them.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict

#: the stock configurations that get one with widths per layer; transformers 4 does not have all of them
STOCK = (
    "Ernie4_5Config",
    "Exaone4Config",
    "Gemma2Config",
    "Gemma3TextConfig",
    "GemmaConfig",
    "Glm4Config",
    "GlmConfig",
    "GraniteConfig",
    "HunYuanDenseV1Config",
    "LlamaConfig",
    "Ministral3Config",
    "MistralConfig",
    "Olmo2Config",
    "Olmo3Config",
    "Phi3Config",
    "Qwen2Config",
    "Qwen2_5_VLTextConfig",
    "Qwen3Config",
    "Qwen3VLTextConfig",
    "SeedOssConfig",
    "SmolLM3Config",
)  #: those of multimodal models that hold such a language model
STOCK_MULTIMODAL = ("Gemma3Config", "Mistral3Config", "Qwen2_5_VLConfig", "Qwen3VLConfig")
#: families whose configuration, in transformers 4, refuses a `rope_scaling` with any but the keys it knows
COUNTS_ROPE_SCALING = ("phi3",)
WIDTH_FIELDS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def strict_if_dataclass(cls: type) -> type:
    """`huggingface_hub.dataclasses.strict`, where configurations are dataclasses (transformers 5), else no change.

    Without it transformers 5 keeps running the validators of the stock class instead of the ones overridden here.
    """
    return strict(cls) if is_dataclass(cls) else cls


def rope_fields_of_transformers_4(model_type: str, rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """The fields in which transformers 4 looks for what transformers 5 keeps in `rope_parameters`.

    Args:
        model_type: of the configuration.
        rope_parameters: one dict, or one per type of attention (Gemma 3).

    Returns:
        `rope_theta`, `rope_scaling` (None for plain rotary positions) and, where they are in use,
        `partial_rotary_factor` and `rope_local_base_freq`; nothing if there is no `rope_theta` to be found.
    """
    everywhere = rope_parameters.get("full_attention") or rope_parameters
    if "rope_theta" not in everywhere:
        return {}
    scaling = dict(everywhere)
    fields = {"rope_theta": scaling.pop("rope_theta")}
    if "sliding_attention" in rope_parameters:
        fields["rope_local_base_freq"] = rope_parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in scaling:
        fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if model_type.removeprefix("prunus_") in COUNTS_ROPE_SCALING:
        scaling["type"] = scaling.pop("rope_type", scaling.get("type"))
        scaling.pop("original_max_position_embeddings", None)  # a field of the configuration itself
    plain = scaling.keys() <= {"rope_type", "type"} and {*scaling.values()} <= {"default"}
    return {**fields, "rope_scaling": None if plain else scaling}


class LayerWidthsMixin:
    """Adds `layer_widths` to a family's configuration.

    Attributes:
        layer_widths: one dict per decoder layer with the keys `num_attention_heads`, `num_key_value_heads` and
            `intermediate_size`; 0 where the block is absent. None means that all layers have the dense widths.
    """

    # Head counts that differ by layer are not divisible by a tensor-parallel size in general.
    base_model_tp_plan = None
    model_type: str
    # `save_pretrained` copies this file next to the weights, as it does for any code that is not in transformers.
    _auto_class = "AutoConfig"

    def __init__(self, *, layer_widths: list[dict[str, int]] | None = None, **kwargs: Any):
        # Only transformers 4 comes here: from 5 on a configuration is a dataclass, whose __init__ is generated. What 5
        # writes as `rope_parameters`, 4 reads from other fields, with defaults that would go unnoticed.
        for field, value in rope_fields_of_transformers_4(self.model_type, kwargs.get("rope_parameters") or {}).items():
            kwargs.setdefault(field, value)
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
            "AutoModelForSequenceClassification": f"modeling_prunus.{stem}ForSequenceClassification",
            "AutoModelForTokenClassification": f"modeling_prunus.{stem}ForTokenClassification",
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
        """This configuration with the global widths of one layer.

        An absent block gets the smallest width that the stock classes can build; the model replaces it anyway.
        """
        widths = self.layer_widths[layer_idx]
        num_key_value_heads = widths["num_key_value_heads"] or 1
        return LayerConfig(
            self,
            num_key_value_heads=num_key_value_heads,
            num_attention_heads=num_key_value_heads * (self.num_attention_heads // self.num_key_value_heads),
            intermediate_size=widths["intermediate_size"] or 1,
        )


class LayerConfig:
    """What one decoder layer takes for the configuration: widths of its own, all else as in the model's configuration.

    No copy: what is changed there later (the attention implementation: eager, sdpa, …) changes for the layer, too.
    """

    def __init__(self, config: Any, **widths: int):
        self.__dict__.update(widths, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by copy and pickle, while there is no `_config` yet
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


class LanguageWidthsMixin:
    """Makes the `text_config` of a multimodal configuration one with widths per layer."""

    _auto_class = "AutoConfig"
    text_config: Any

    def __init__(self, *, text_config: Any = None, **kwargs: Any):
        # Only transformers 4 comes here.
        super().__init__(text_config=own_text_config(text_config), **kwargs)  # type: ignore[call-arg]
        self._complete()

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = own_text_config(self.text_config)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self._complete()

    def _complete(self: Any) -> None:
        stem = type(self).__name__.removesuffix("Config")
        self.auto_map = {
            "AutoConfig": f"configuration_prunus.{stem}Config",
            "AutoModelForImageTextToText": f"modeling_prunus.{stem}ForConditionalGeneration",
        }


def own_text_config(fields: Any) -> Any:
    """The configuration of a language model, from its fields; one that is made is answered as it is."""
    if not isinstance(fields, dict):
        return fields
    classes = {cls.model_type: cls for cls in CONFIGURATIONS.values()}
    return classes[fields["model_type"]](**{name: value for name, value in fields.items() if name != "model_type"})


def with_language_widths(stock: Any) -> Any:
    """The configuration class of a multimodal model with a ragged language model.

    Args:
        stock: its configuration class in transformers, `Gemma3Config`.

    Returns:
        `PrunusGemma3Config`, of model type `prunus_gemma3`.
    """
    return strict_if_dataclass(
        type(
            f"Prunus{stock.__name__}",
            (LanguageWidthsMixin, stock),
            {
                "__module__": __name__,
                "__doc__": f"{stock.__name__} whose language model has one set of widths per decoder layer.",
                "model_type": f"prunus_{stock.model_type}",
            },
        )
    )


def with_layer_widths(stock: Any) -> Any:
    """The configuration class with `layer_widths` of a family.

    Args:
        stock: its configuration class in transformers, `LlamaConfig`.

    Returns:
        `PrunusLlamaConfig`, of model type `prunus_llama`.
    """
    return strict_if_dataclass(
        type(
            f"Prunus{stock.__name__}",
            (LayerWidthsMixin, stock),
            {
                "__module__": __name__,
                "__doc__": f"{stock.__name__} with one set of widths per decoder layer.",
                "__annotations__": {"layer_widths": "list[dict[str, int]] | None"},
                "model_type": f"prunus_{stock.model_type}",
                "layer_widths": None,
            },
        )
    )


#: family, as the names of its classes in transformers begin → its configuration here
CONFIGURATIONS = {
    name.removesuffix("Config"): with_layer_widths(getattr(transformers, name))
    for name in STOCK
    if hasattr(transformers, name)
}
#: the same for multimodal models, in which a language model has widths per layer
MULTIMODAL = {
    name.removesuffix("Config"): with_language_widths(getattr(transformers, name))
    for name in STOCK_MULTIMODAL
    if hasattr(transformers, name)
}
# transformers looks for a class by its name in this module.
_CLASSES = [*CONFIGURATIONS.values(), *MULTIMODAL.values()]
globals().update({cls.__name__: cls for cls in _CLASSES})
__all__ = [cls.__name__ for cls in _CLASSES]
