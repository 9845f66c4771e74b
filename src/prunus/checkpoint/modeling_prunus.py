"""Models whose decoder layers differ in width.

This file travels with every checkpoint of such a model, so it must import nothing but torch, transformers and its
neighbour `configuration_prunus`. No forward is copied: each decoder layer is the family's stock layer, built from a
copy of the configuration that holds this layer's widths, and a block that was cut away whole is replaced by a module
that answers zero, so that the stock forward adds nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma2PreTrainedModel,
    Gemma3ForCausalLM,
    Gemma3PreTrainedModel,
    Gemma3TextModel,
    GraniteForCausalLM,
    GraniteModel,
    GranitePreTrainedModel,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    Olmo2ForCausalLM,
    Olmo2Model,
    Olmo2PreTrainedModel,
    Phi3ForCausalLM,
    Phi3Model,
    Phi3PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    SmolLM3ForCausalLM,
    SmolLM3Model,
    SmolLM3PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from .configuration_prunus import (
    PrunusGemma2Config,
    PrunusGemma3TextConfig,
    PrunusGraniteConfig,
    PrunusLlamaConfig,
    PrunusMistralConfig,
    PrunusOlmo2Config,
    PrunusPhi3Config,
    PrunusQwen2Config,
    PrunusQwen3Config,
    PrunusSmolLM3Config,
)


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

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

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

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any):
        with without_layers(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        decoder = getattr(self, "model", self)  # inside a model with a head, or the model itself
        decoder.layers.extend(self._build_layer(layer_idx) for layer_idx in range(config.num_hidden_layers))
        decoder.register_forward_hook(none_for_absent_attention)
        # Again, for the layers: initialise them (under from_pretrained: nothing) and collect what they declare.
        self.post_init()

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
            layer.self_attn = AbsentAttention(layer_idx)
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


class SequenceClassifier(LayerWidthsClassifier, GenericForSequenceClassification):
    """A head on the last token that is no padding."""


class TokenClassifier(LayerWidthsClassifier, GenericForTokenClassification):
    """A head on every token."""


class PrunusLlamaModel(LayerWidthsModel, LlamaModel):
    """Llama decoder with one set of widths per layer."""

    config_class = PrunusLlamaConfig
    decoder_layer = LlamaDecoderLayer
    _auto_class = "AutoModel"


class PrunusLlamaForCausalLM(LayerWidthsModel, LlamaForCausalLM):
    """Llama language model with one set of widths per layer."""

    config_class = PrunusLlamaConfig
    decoder_layer = LlamaDecoderLayer
    _auto_class = "AutoModelForCausalLM"


class PrunusLlamaForSequenceClassification(SequenceClassifier, LlamaPreTrainedModel):
    """Llama sequence classifier with one set of widths per layer."""

    config_class = PrunusLlamaConfig
    decoder = PrunusLlamaModel
    _auto_class = "AutoModelForSequenceClassification"


class PrunusLlamaForTokenClassification(TokenClassifier, LlamaPreTrainedModel):
    """Llama token classifier with one set of widths per layer."""

    config_class = PrunusLlamaConfig
    decoder = PrunusLlamaModel
    _auto_class = "AutoModelForTokenClassification"


class PrunusMistralModel(LayerWidthsModel, MistralModel):
    """Mistral decoder with one set of widths per layer."""

    config_class = PrunusMistralConfig
    decoder_layer = MistralDecoderLayer
    _auto_class = "AutoModel"


class PrunusMistralForCausalLM(LayerWidthsModel, MistralForCausalLM):
    """Mistral language model with one set of widths per layer."""

    config_class = PrunusMistralConfig
    decoder_layer = MistralDecoderLayer
    _auto_class = "AutoModelForCausalLM"


class PrunusMistralForSequenceClassification(SequenceClassifier, MistralPreTrainedModel):
    """Mistral sequence classifier with one set of widths per layer."""

    config_class = PrunusMistralConfig
    decoder = PrunusMistralModel
    _auto_class = "AutoModelForSequenceClassification"


class PrunusMistralForTokenClassification(TokenClassifier, MistralPreTrainedModel):
    """Mistral token classifier with one set of widths per layer."""

    config_class = PrunusMistralConfig
    decoder = PrunusMistralModel
    _auto_class = "AutoModelForTokenClassification"


class PrunusQwen2Model(LayerWidthsModel, Qwen2Model):
    """Qwen2 decoder with one set of widths per layer."""

    config_class = PrunusQwen2Config
    decoder_layer = Qwen2DecoderLayer
    _auto_class = "AutoModel"


class PrunusQwen2ForCausalLM(LayerWidthsModel, Qwen2ForCausalLM):
    """Qwen2 language model with one set of widths per layer."""

    config_class = PrunusQwen2Config
    decoder_layer = Qwen2DecoderLayer
    _auto_class = "AutoModelForCausalLM"


class PrunusQwen2ForSequenceClassification(SequenceClassifier, Qwen2PreTrainedModel):
    """Qwen2 sequence classifier with one set of widths per layer."""

    config_class = PrunusQwen2Config
    decoder = PrunusQwen2Model
    _auto_class = "AutoModelForSequenceClassification"


class PrunusQwen2ForTokenClassification(TokenClassifier, Qwen2PreTrainedModel):
    """Qwen2 token classifier with one set of widths per layer."""

    config_class = PrunusQwen2Config
    decoder = PrunusQwen2Model
    _auto_class = "AutoModelForTokenClassification"


class PrunusQwen3Model(LayerWidthsModel, Qwen3Model):
    """Qwen3 decoder with one set of widths per layer."""

    config_class = PrunusQwen3Config
    decoder_layer = Qwen3DecoderLayer
    _auto_class = "AutoModel"


class PrunusQwen3ForCausalLM(LayerWidthsModel, Qwen3ForCausalLM):
    """Qwen3 language model with one set of widths per layer."""

    config_class = PrunusQwen3Config
    decoder_layer = Qwen3DecoderLayer
    _auto_class = "AutoModelForCausalLM"


class PrunusQwen3ForSequenceClassification(SequenceClassifier, Qwen3PreTrainedModel):
    """Qwen3 sequence classifier with one set of widths per layer."""

    config_class = PrunusQwen3Config
    decoder = PrunusQwen3Model
    _auto_class = "AutoModelForSequenceClassification"


class PrunusQwen3ForTokenClassification(TokenClassifier, Qwen3PreTrainedModel):
    """Qwen3 token classifier with one set of widths per layer."""

    config_class = PrunusQwen3Config
    decoder = PrunusQwen3Model
    _auto_class = "AutoModelForTokenClassification"


class PrunusGraniteModel(LayerWidthsModel, GraniteModel):
    """Granite decoder with one set of widths per layer."""

    config_class = PrunusGraniteConfig
    decoder_layer = GraniteDecoderLayer
    _auto_class = "AutoModel"


class PrunusGraniteForCausalLM(LayerWidthsModel, GraniteForCausalLM):
    """Granite language model with one set of widths per layer."""

    config_class = PrunusGraniteConfig
    decoder_layer = GraniteDecoderLayer
    _auto_class = "AutoModelForCausalLM"


class PrunusGraniteForSequenceClassification(SequenceClassifier, GranitePreTrainedModel):
    """Granite sequence classifier with one set of widths per layer."""

    config_class = PrunusGraniteConfig
    decoder = PrunusGraniteModel
    _auto_class = "AutoModelForSequenceClassification"


class PrunusGraniteForTokenClassification(TokenClassifier, GranitePreTrainedModel):
    """Granite token classifier with one set of widths per layer."""

    config_class = PrunusGraniteConfig
    decoder = PrunusGraniteModel
    _auto_class = "AutoModelForTokenClassification"


class PrunusSmolLM3Model(LayerWidthsModel, SmolLM3Model):
    """SmolLM3 decoder with one set of widths per layer."""

    config_class = PrunusSmolLM3Config
    decoder_layer = SmolLM3DecoderLayer
    _auto_class = "AutoModel"


class PrunusSmolLM3ForCausalLM(LayerWidthsModel, SmolLM3ForCausalLM):
    """SmolLM3 language model with one set of widths per layer."""

    config_class = PrunusSmolLM3Config
    decoder_layer = SmolLM3DecoderLayer
    _auto_class = "AutoModelForCausalLM"


class PrunusSmolLM3ForSequenceClassification(SequenceClassifier, SmolLM3PreTrainedModel):
    """SmolLM3 sequence classifier with one set of widths per layer."""

    config_class = PrunusSmolLM3Config
    decoder = PrunusSmolLM3Model
    _auto_class = "AutoModelForSequenceClassification"


class PrunusSmolLM3ForTokenClassification(TokenClassifier, SmolLM3PreTrainedModel):
    """SmolLM3 token classifier with one set of widths per layer."""

    config_class = PrunusSmolLM3Config
    decoder = PrunusSmolLM3Model
    _auto_class = "AutoModelForTokenClassification"


class PrunusOlmo2Model(LayerWidthsModel, Olmo2Model):
    """OLMo 2 decoder with one set of widths per layer."""

    config_class = PrunusOlmo2Config
    decoder_layer = Olmo2DecoderLayer
    attention_norms = ("post_attention_layernorm",)
    mlp_norms = ("post_feedforward_layernorm",)
    _auto_class = "AutoModel"


class PrunusOlmo2ForCausalLM(LayerWidthsModel, Olmo2ForCausalLM):
    """OLMo 2 language model with one set of widths per layer."""

    config_class = PrunusOlmo2Config
    decoder_layer = Olmo2DecoderLayer
    attention_norms = ("post_attention_layernorm",)
    mlp_norms = ("post_feedforward_layernorm",)
    _auto_class = "AutoModelForCausalLM"


class PrunusOlmo2ForSequenceClassification(SequenceClassifier, Olmo2PreTrainedModel):
    """OLMo 2 sequence classifier with one set of widths per layer."""

    config_class = PrunusOlmo2Config
    decoder = PrunusOlmo2Model
    _auto_class = "AutoModelForSequenceClassification"


class PrunusOlmo2ForTokenClassification(TokenClassifier, Olmo2PreTrainedModel):
    """OLMo 2 token classifier with one set of widths per layer."""

    config_class = PrunusOlmo2Config
    decoder = PrunusOlmo2Model
    _auto_class = "AutoModelForTokenClassification"


class PrunusPhi3Model(LayerWidthsModel, Phi3Model):
    """Phi-3 decoder with one set of widths per layer."""

    config_class = PrunusPhi3Config
    decoder_layer = Phi3DecoderLayer
    _auto_class = "AutoModel"


class PrunusPhi3ForCausalLM(LayerWidthsModel, Phi3ForCausalLM):
    """Phi-3 language model with one set of widths per layer."""

    config_class = PrunusPhi3Config
    decoder_layer = Phi3DecoderLayer
    _auto_class = "AutoModelForCausalLM"


class PrunusPhi3ForSequenceClassification(SequenceClassifier, Phi3PreTrainedModel):
    """Phi-3 sequence classifier with one set of widths per layer."""

    config_class = PrunusPhi3Config
    decoder = PrunusPhi3Model
    _auto_class = "AutoModelForSequenceClassification"


class PrunusPhi3ForTokenClassification(TokenClassifier, Phi3PreTrainedModel):
    """Phi-3 token classifier with one set of widths per layer."""

    config_class = PrunusPhi3Config
    decoder = PrunusPhi3Model
    _auto_class = "AutoModelForTokenClassification"


class PrunusGemma2Model(LayerWidthsModel, Gemma2Model):
    """Gemma 2 decoder with one set of widths per layer."""

    config_class = PrunusGemma2Config
    decoder_layer = Gemma2DecoderLayer
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    _auto_class = "AutoModel"


class PrunusGemma2ForCausalLM(LayerWidthsModel, Gemma2ForCausalLM):
    """Gemma 2 language model with one set of widths per layer."""

    config_class = PrunusGemma2Config
    decoder_layer = Gemma2DecoderLayer
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    _auto_class = "AutoModelForCausalLM"


class PrunusGemma2ForSequenceClassification(SequenceClassifier, Gemma2PreTrainedModel):
    """Gemma 2 sequence classifier with one set of widths per layer."""

    config_class = PrunusGemma2Config
    decoder = PrunusGemma2Model
    _auto_class = "AutoModelForSequenceClassification"


class PrunusGemma2ForTokenClassification(TokenClassifier, Gemma2PreTrainedModel):
    """Gemma 2 token classifier with one set of widths per layer."""

    config_class = PrunusGemma2Config
    decoder = PrunusGemma2Model
    _auto_class = "AutoModelForTokenClassification"


class PrunusGemma3TextModel(LayerWidthsModel, Gemma3TextModel):
    """Gemma 3 (text) decoder with one set of widths per layer."""

    config_class = PrunusGemma3TextConfig
    base_model_prefix = "model"  # in transformers 4 another, under which AutoModel would not find the weights
    decoder_layer = Gemma3DecoderLayer
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    _auto_class = "AutoModel"


class PrunusGemma3TextForCausalLM(LayerWidthsModel, Gemma3ForCausalLM):
    """Gemma 3 (text) language model with one set of widths per layer."""

    config_class = PrunusGemma3TextConfig
    base_model_prefix = "model"  # in transformers 4 another, under which AutoModel would not find the weights
    decoder_layer = Gemma3DecoderLayer
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    _auto_class = "AutoModelForCausalLM"


class PrunusGemma3TextForSequenceClassification(SequenceClassifier, Gemma3PreTrainedModel):
    """Gemma 3 (text) sequence classifier with one set of widths per layer."""

    config_class = PrunusGemma3TextConfig
    decoder = PrunusGemma3TextModel
    _auto_class = "AutoModelForSequenceClassification"


class PrunusGemma3TextForTokenClassification(TokenClassifier, Gemma3PreTrainedModel):
    """Gemma 3 (text) token classifier with one set of widths per layer."""

    config_class = PrunusGemma3TextConfig
    decoder = PrunusGemma3TextModel
    _auto_class = "AutoModelForTokenClassification"


__all__ = [
    "PrunusGemma2ForCausalLM",
    "PrunusGemma2ForSequenceClassification",
    "PrunusGemma2ForTokenClassification",
    "PrunusGemma2Model",
    "PrunusGemma3TextForCausalLM",
    "PrunusGemma3TextForSequenceClassification",
    "PrunusGemma3TextForTokenClassification",
    "PrunusGemma3TextModel",
    "PrunusGraniteForCausalLM",
    "PrunusGraniteForSequenceClassification",
    "PrunusGraniteForTokenClassification",
    "PrunusGraniteModel",
    "PrunusLlamaForCausalLM",
    "PrunusLlamaForSequenceClassification",
    "PrunusLlamaForTokenClassification",
    "PrunusLlamaModel",
    "PrunusMistralForCausalLM",
    "PrunusMistralForSequenceClassification",
    "PrunusMistralForTokenClassification",
    "PrunusMistralModel",
    "PrunusOlmo2ForCausalLM",
    "PrunusOlmo2ForSequenceClassification",
    "PrunusOlmo2ForTokenClassification",
    "PrunusOlmo2Model",
    "PrunusPhi3ForCausalLM",
    "PrunusPhi3ForSequenceClassification",
    "PrunusPhi3ForTokenClassification",
    "PrunusPhi3Model",
    "PrunusQwen2ForCausalLM",
    "PrunusQwen2ForSequenceClassification",
    "PrunusQwen2ForTokenClassification",
    "PrunusQwen2Model",
    "PrunusQwen3ForCausalLM",
    "PrunusQwen3ForSequenceClassification",
    "PrunusQwen3ForTokenClassification",
    "PrunusQwen3Model",
    "PrunusSmolLM3ForCausalLM",
    "PrunusSmolLM3ForSequenceClassification",
    "PrunusSmolLM3ForTokenClassification",
    "PrunusSmolLM3Model",
]
