"""Models whose decoder layers differ in width.

This file travels with every checkpoint of such a model, so it must import nothing but torch, transformers and its
neighbour `configuration_prunus`. No forward is copied: each decoder layer is the family's stock layer, built from a
copy of the configuration that holds this layer's widths, and a block that was cut away whole is replaced by a module
that answers zero, so that the stock forward adds nothing for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from .configuration_prunus import CONFIGURATIONS, MULTIMODAL


class AbsentBlock(nn.Module):
    """Stands where a block was cut away whole: no parameters, the output is zero."""

    # Not only a common name: transformers looks for classes "…Attention(nn.Module)" in this file's text, and where it
    # finds one it concludes that the attention implementation (eager, sdpa, …) cannot be chosen.


class AbsentAttention(AbsentBlock):
    """Stands where a layer's attention was cut away.

    It still tells the cache that tokens went by, with one number per token instead of keys and values. A cache has one
    entry per decoder layer, and transformers reads the number of tokens seen off the first entry (and the sizes of the
    masks off the first entry of each layer type); an entry that stayed empty would restart the positions at every step.
    """

    # Gemma 3 asks for it in transformers 4, to choose between two kinds of positions; here nothing depends on them.
    is_sliding = False

    def __init__(self, layer_idx: int, attention_type: str | None):
        super().__init__()
        self.layer_idx = layer_idx
        # OLMo 3 asks for it in transformers 4, to choose between masks; here nothing depends on them.
        self.attention_type = attention_type

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        cache: Any = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Zeros of the shape of `hidden_states`, (batch, tokens, hidden_size), and no attention weights."""
        # `cache` is what transformers calls it from 5.24 on; `cache_position` is passed before 5 only.
        cache = past_key_values if cache is None else cache
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            ticks = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(ticks, ticks, self.layer_idx, {"cache_position": cache_position})
        return torch.zeros_like(hidden_states), None


class AbsentMLP(AbsentBlock):
    """Stands where a layer's MLP was cut away."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros of the shape of `hidden_states`, (batch, tokens, hidden_size)."""
        return torch.zeros_like(hidden_states)


@contextmanager
def without_layers(config: Any) -> Iterator[None]:
    """Let the stock constructor build everything but the decoder layers, which would have the dense widths."""
    num_hidden_layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_hidden_layers


def none_for_absent_attention(decoder: Any, args: Any, output: Any) -> Any:
    """A forward hook: where a layer has no attention, its place among the attention weights is taken by None.

    transformers collects what the attentions of the stock class return, one after another; without this the weights of
    later layers would stand at the places of earlier ones.
    """
    attentions = output[-1] if isinstance(output, tuple) else output.get("attentions")
    present = [not isinstance(layer.self_attn, AbsentAttention) for layer in decoder.layers]
    if all(present) or not isinstance(attentions, tuple) or len(attentions) != sum(present):
        return output
    collected = iter(attentions)
    in_place = tuple(next(collected) if there else None for there in present)
    if isinstance(output, tuple):
        return (*output[:-1], in_place)
    output["attentions"] = in_place
    return output


class LayerWidthsModel:
    """Mixin that gives each decoder layer of a stock model class its own widths, from `config.layer_widths`.

    A family sets `decoder_layer`, and the norms that leave with a block where their names differ.
    """

    decoder_layer: type[nn.Module]
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        # No type at `self`: vLLM compares what is given in places with the types written there, from the first one on.
        with without_layers(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        decoder = getattr(model, "model", model)  # inside a model with a head, or the model itself
        decoder.layers.extend(model._build_layer(layer_idx) for layer_idx in range(config.num_hidden_layers))
        decoder.register_forward_hook(none_for_absent_attention)
        # Again, for the layers: initialise them (under from_pretrained: nothing) and collect what they declare.
        model.post_init()

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As of the stock class, where all layers have the number of key/value heads that the configuration names.

        Raises:
            ValueError: they have not. The paged cache has room for one number of heads in all layers, and what went
                wrong in its thread would only be logged, with empty answers.
        """
        heads = [widths["num_key_value_heads"] for widths in self.config.layer_widths]
        if set(heads) != {self.config.num_key_value_heads}:
            raise ValueError(
                f"the layers of this pruned model have {sorted(set(heads))} key/value heads (0: no attention), and "
                f"continuous batching needs the {self.config.num_key_value_heads} of the dense model in every layer; "
                "use generate instead"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _get_static_cache_init_shape(self) -> None:
        # transformers would allocate a static cache with one number of heads for all layers. None: each entry takes
        # its shape from the first keys it is given, as in every other case.
        return None

    def _build_layer(self: Any, layer_idx: int) -> nn.Module:
        layer: Any = self.decoder_layer(self.config.layer_config(layer_idx), layer_idx)
        widths = self.config.layer_widths[layer_idx]
        if not widths["num_key_value_heads"]:
            layer.self_attn = AbsentAttention(layer_idx, getattr(layer.self_attn, "attention_type", None))
            for norm in self.attention_norms:
                setattr(layer, norm, nn.Identity())
        if not widths["intermediate_size"]:
            layer.mlp = AbsentMLP()
            for norm in self.mlp_norms:
                setattr(layer, norm, nn.Identity())
        return layer


class LayerWidthsClassifier:
    """Mixin for transformers' generic classifiers: the decoder they stand on is the ragged one. A family sets it."""

    decoder: type[nn.Module]

    def __init__(self, config: Any):
        # They ask AutoModel for it, which would ask the user whether to run the code that travels with the model, and
        # is running already.
        AutoModel.register(type(config), self.decoder, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]


class LayerWidthsInside:
    """Mixin for multimodal models: the decoder of their language model is the ragged one."""

    def __init__(self: Any, config: Any):
        decoder: Any = DECODERS[type(config.text_config).__name__]
        # As for classifiers: some ask AutoModel for it. Others take the stock class, which then makes room.
        AutoModel.register(type(config.text_config), decoder, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]
        if not isinstance(self.model.language_model, decoder):
            self.model.language_model = decoder._from_config(config.text_config)
            self.post_init()


class SequenceClassifier(LayerWidthsClassifier, GenericForSequenceClassification):
    """A head on the last token that is no padding."""


class TokenClassifier(LayerWidthsClassifier, GenericForTokenClassification):
    """A head on every token."""


#: the norms that leave with an absent attention and an absent MLP, as families lay them out: one norm before each
#: block, one after, both, and both in GLM's words
BEFORE = (("input_layernorm",), ("post_attention_layernorm",))
AFTER = (("post_attention_layernorm",), ("post_feedforward_layernorm",))
AROUND = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
AROUND_GLM = (
    ("input_layernorm", "post_self_attn_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
)

#: family, as the names of its classes in transformers begin → its norms
NORMS = {
    "Ernie4_5": BEFORE,
    "Exaone4": AFTER,
    "Gemma": BEFORE,
    "Gemma2": AROUND,
    "Gemma3Text": AROUND,
    "Glm": BEFORE,
    "Glm4": AROUND_GLM,
    "Granite": BEFORE,
    "HunYuanDenseV1": BEFORE,
    "Llama": BEFORE,
    "Ministral3": BEFORE,
    "Mistral": BEFORE,
    "Olmo2": AFTER,
    "Olmo3": AFTER,
    "Phi3": BEFORE,
    "Qwen2": BEFORE,
    "Qwen2_5_VLText": BEFORE,
    "Qwen3": BEFORE,
    "Qwen3VLText": BEFORE,
    "SeedOss": BEFORE,
    "SmolLM3": BEFORE,
}
#: families that transformers has inside multimodal models only: of those it has no language model
ONLY_INSIDE = ("Qwen2_5_VLText", "Qwen3VLText")


def stock_class(family: str, ending: str) -> Any:
    """A class of a family in transformers: `LlamaModel`; Gemma 3 says "Text" in the names of some only."""
    module: Any = sys.modules[getattr(transformers, f"{family}Model").__module__]
    name = next(name for name in (family + ending, family.removesuffix("Text") + ending) if hasattr(module, name))
    return getattr(module, name)


def ragged_classes(family: str) -> Iterator[type]:
    """The decoder, the language model and the two classifiers of a family, with one set of widths per layer.

    Args:
        family: a key of `NORMS`.
    """
    attention_norms, mlp_norms = NORMS[family]
    common = {"__module__": __name__, "config_class": CONFIGURATIONS[family]}
    own_layers = {
        **common,
        "decoder_layer": stock_class(family, "DecoderLayer"),
        "attention_norms": attention_norms,
        "mlp_norms": mlp_norms,
    }
    decoder = type(
        f"Prunus{family}Model",
        (LayerWidthsModel, stock_class(family, "Model")),
        {**own_layers, "_auto_class": "AutoModel", "__doc__": f"{family} decoder with one set of widths per layer."},
    )
    yield decoder
    if family in ONLY_INSIDE:
        return
    yield type(
        f"Prunus{family}ForCausalLM",
        (LayerWidthsModel, stock_class(family, "ForCausalLM")),
        {
            **own_layers,
            "_auto_class": "AutoModelForCausalLM",
            "__doc__": f"{family} language model with one set of widths per layer.",
        },
    )
    for kind, mixin in (("Sequence", SequenceClassifier), ("Token", TokenClassifier)):
        yield type(
            f"Prunus{family}For{kind}Classification",
            (mixin, stock_class(family, "PreTrainedModel")),
            {
                **common,
                "decoder": decoder,
                "_auto_class": f"AutoModelFor{kind}Classification",
                "__doc__": f"{family} {kind.lower()} classifier with one set of widths per layer.",
            },
        )


def multimodal_class(name: str) -> type:
    """A multimodal model around a language model with one set of widths per layer.

    Args:
        name: as the names of its classes in transformers begin.
    """
    return type(
        f"Prunus{name}ForConditionalGeneration",
        (LayerWidthsInside, getattr(transformers, f"{name}ForConditionalGeneration")),
        {
            "__module__": __name__,
            "__doc__": f"{name} around a language model with one set of widths per layer.",
            "config_class": MULTIMODAL[name],
            "_auto_class": "AutoModelForImageTextToText",
        },
    )


_CLASSES: list[Any] = [cls for family in CONFIGURATIONS for cls in ragged_classes(family)]
#: name of a language model's configuration class → its decoder; by name, as transformers may have loaded the class a
#: second time, from another copy of its file
DECODERS = {cls.config_class.__name__: cls for cls in _CLASSES if cls._auto_class == "AutoModel"}
_CLASSES += [multimodal_class(name) for name in MULTIMODAL]
# transformers looks for a class by its name in this module.
globals().update({cls.__name__: cls for cls in _CLASSES})
__all__ = [cls.__name__ for cls in _CLASSES]
