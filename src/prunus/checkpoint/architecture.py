"""Which transformers class a set of layer widths needs, and an empty model of that class.

Equal widths in every layer fit the family's stock class, so the result loads anywhere without any code of ours. Unequal
widths, or absent blocks, need the classes of `modeling_prunus`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from prunus.checkpoint import configuration_prunus, modeling_prunus
from prunus.errors import CheckpointError, PlanError, PrunusError, UnsupportedModelError
from prunus.model.families import PRUNED_PREFIX, Mixture, family_of
from prunus.model.modules import submodule
from prunus.model.widths import LayerWidths, layer_widths_of

__all__ = ["config_as_weighted", "empty_model", "is_ragged", "pruned_config", "register"]

#: config fields that hold one value per decoder layer
PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers")
#: config field that lists the layers without experts, in families whose layers have them every so often
DENSE_LAYERS, EXPERT_STEP = "mlp_only_layers", "decoder_sparse_step"
#: config field with the number of layers without experts in front of those that have some
FIRST_DENSE = "first_k_dense_replace"
#: config fields with the first and the last layer that have experts (ERNIE), and their distance
FIRST_SPARSE, LAST_SPARSE, SPARSE_STEP = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"
#: config field with the number of layers behind the decoder that predict further tokens
FURTHER_TOKENS = "num_nextn_predict_layers"
#: config fields that describe one checkpoint rather than the architecture, or are set anew
DROPPED_FIELDS = ("layer_widths", "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
#: fields of Llama's config that Mistral's does not have
LLAMA_ONLY_FIELDS = ("attention_bias", "mlp_bias", "pretraining_tp")


def register() -> None:
    """Tell transformers' Auto classes about the model types that prunus writes. Calling it again does no harm."""
    for name in modeling_prunus.__all__:
        model_class = getattr(modeling_prunus, name)
        AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
        getattr(transformers, model_class._auto_class).register(model_class.config_class, model_class, exist_ok=True)


def is_ragged(config: Any) -> bool:
    """Whether a config is one of those with widths per layer, which stock transformers does not know."""
    return isinstance(config, configuration_prunus.LayerWidthsMixin)


def config_as_weighted(model: Any) -> Any:
    """The config of a model, saying of head and embeddings what the weights say: one tensor, or two.

    Fine-tuning may give a model a head of its own while its config still ties it to the embeddings, and code may tie
    them by hand. transformers goes on with the weights, but what is made from the config alone would not.

    Args:
        model: a causal language model of a described family; it stays as it is.

    Returns:
        The model's own config, or a copy of it where the two are at odds.
    """
    family, config = family_of(model.config), model.config
    tied = submodule(model, family.head).weight is submodule(model, family.embedding).weight
    if bool(config.tie_word_embeddings) != tied:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = tied
    return config


def pruned_config(config: Any, widths: Sequence[LayerWidths], layer_indices: Sequence[int]) -> Any:
    """The config of a model that keeps `widths` groups in its layers.

    Args:
        config: config of the model that is cut, stock or already written by prunus. It is not changed.
        widths: groups that each remaining decoder layer keeps.
        layer_indices: index, in the model that is cut, of each remaining decoder layer; config fields with one value
            per layer follow them.

    Returns:
        The family's stock config if all layers (of a mixture, all of a kind) have equal widths and all blocks. A Llama
        whose number of heads does not divide its hidden size is refused by LlamaConfig; without biases it is exactly a
        Mistral without sliding window, and becomes one. Everything else gets the config with `layer_widths`.

    Raises:
        PlanError: no layer is left, a layer has neither block, or `layer_indices` are not increasing indices of layers.
        UnsupportedModelError: the family is not described, the config has per-layer overrides of its own, or no class
            loads a mixture of experts of these widths.
    """
    family = family_of(config)
    _check_layers(config, widths, layer_indices)
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModelError(
            "the config has a per_layer_config, whose overrides prunus would lose; load the model with a plain config"
        )
    fields = _fields_of_layers(config, layer_indices)
    if family.mixture is not None:
        return _mixture_config(config, family.model_type, family.mixture, fields, widths)
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    pruned = None
    if len(set(widths)) == 1 and widths[0].num_key_value_heads and widths[0].intermediate_size:
        uniform = {
            "num_attention_heads": widths[0].num_key_value_heads * num_key_value_groups,
            "num_key_value_heads": widths[0].num_key_value_heads,
            "intermediate_size": widths[0].intermediate_size,
        }
        pruned = _stock_config(family.model_type, {**fields, **uniform})
    if pruned is None:
        layer_widths = [
            {
                "num_attention_heads": layer.num_key_value_heads * num_key_value_groups,
                "num_key_value_heads": layer.num_key_value_heads,
                "intermediate_size": layer.intermediate_size,
            }
            for layer in widths
        ]
        pruned = AutoConfig.for_model(PRUNED_PREFIX + family.model_type, **fields, layer_widths=layer_widths)
    # Not part of to_dict: a model that was loaded with eager attention keeps it.
    pruned._attn_implementation = config._attn_implementation
    return pruned


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A causal language model without weights: parameters on the meta device, all else ready to run.

    Follow with `model.load_state_dict(weights, assign=True)`; where embeddings are tied, the weights need not hold the
    head (`strict=False`), and `model.tie_weights()` must come last, since assigning breaks the tie.

    Args:
        config: stock or prunus config.
        dtype: dtype of the parameters.

    Returns:
        The model in eval mode. Buffers that checkpoints do not hold (rotary frequencies) are real, on the CPU.

    Raises:
        CheckpointError: the config has values that no model can be built with.
        UnsupportedModelError: a buffer is neither stored in checkpoints nor set by the model's `_init_weights`.
    """
    try:
        with torch.device("meta"):
            # Of a copy: building notes the dtype in the config, where that of the checkpoint stands.
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
        _give_values_to_buffers(model)
    except PrunusError:
        raise
    except Exception as error:  # what impossible values lead to: an unknown activation, a size of -1
        raise CheckpointError(
            f"the config describes no {config.model_type} model that can be built: {type(error).__name__} {error}"
        ) from error
    return model.eval()


def _give_values_to_buffers(model: Any) -> None:
    """Put the buffers that no checkpoint holds on the CPU, with their values."""
    for path, module in model.named_modules():
        unsaved = [
            name for name in module._non_persistent_buffers_set if getattr(getattr(module, name), "is_meta", False)
        ]
        for name in unsaved:
            buffer = getattr(module, name)
            fill = float("nan") if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, fill, device="cpu"))
        if unsaved:
            # How from_pretrained, too, gives values to buffers that no checkpoint holds.
            with torch.no_grad():
                model._init_weights(module)
        for name in unsaved:
            buffer = getattr(module, name)
            if buffer.is_floating_point() and buffer.isnan().any():
                raise UnsupportedModelError(
                    f"{type(module).__name__} at {path!r} does not initialise its buffer {name!r}, and checkpoints do "
                    "not hold it: a model rebuilt from weights alone would compute garbage"
                )


def _mixture_config(
    config: Any, model_type: str, mixture: Mixture, fields: dict[str, Any], widths: Sequence[LayerWidths]
) -> Any:
    """The stock config of a mixture of experts whose layers have these widths.

    Raises:
        UnsupportedModelError: no stock config describes them.
    """
    num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * widths[0].num_key_value_heads * num_key_value_groups != config.hidden_size or "head_dim" in fields:
        fields["head_dim"] = head_dim
    if FURTHER_TOKENS in fields:
        fields[FURTHER_TOKENS] = 0  # their layers were not read, and are not in the result
    first = {bool(layer.num_experts): layer for layer in reversed(widths)}
    fields["num_key_value_heads"] = widths[0].num_key_value_heads
    fields["num_attention_heads"] = widths[0].num_key_value_heads * num_key_value_groups
    if False in first:
        fields["intermediate_size"] = first[False].intermediate_size
    if True in first:
        for name in (mixture.count, config.attribute_map.get(mixture.count)):
            if name is not None:
                fields.pop(name, None)
        fields[mixture.count] = first[True].num_experts
        if mixture.shared_field:
            fields[mixture.shared_field] = first[True].intermediate_size
    pruned = AutoConfig.for_model(model_type, **fields)
    if layer_widths_of(pruned) != tuple(widths):
        raise UnsupportedModelError(
            f"no class of transformers loads a {model_type} model whose layers keep "
            f"{'; '.join(dict.fromkeys(map(str, widths)))}: all of a kind must keep as many, and shared experts whole "
            "ones. Plan with `shape=uniform`"
        )
    pruned._attn_implementation = config._attn_implementation
    return pruned


def _check_layers(config: Any, widths: Sequence[LayerWidths], layer_indices: Sequence[int]) -> None:
    if not widths:
        raise PlanError("the plan leaves no decoder layer; keep at least one group")
    if len(widths) != len(layer_indices):
        raise PlanError(f"{len(widths)} layer widths were given for {len(layer_indices)} remaining layers")
    in_order = all(a < b for a, b in pairwise(layer_indices))
    if not in_order or layer_indices[0] < 0 or layer_indices[-1] >= config.num_hidden_layers:
        raise PlanError(
            f"layer indices {list(layer_indices)} are not increasing indices of the model's "
            f"{config.num_hidden_layers} decoder layers"
        )
    for layer_idx, layer in zip(layer_indices, widths, strict=True):
        if not layer:
            raise PlanError(f"layer {layer_idx} keeps neither attention nor MLP; leave it out altogether")


def _fields_of_layers(config: Any, layer_indices: Sequence[int]) -> dict[str, Any]:
    """The fields of `config` for a model that has only these layers, in this order."""
    fields = {name: value for name, value in config.to_dict().items() if name not in DROPPED_FIELDS}
    fields["num_hidden_layers"] = len(layer_indices)
    for name in PER_LAYER_FIELDS:
        if fields.get(name) is not None:
            fields[name] = [fields[name][layer_idx] for layer_idx in layer_indices]
    if fields.get(DENSE_LAYERS) is not None and len(layer_indices) < config.num_hidden_layers:
        # Which layers have experts no longer follows from their number.
        mixture = family_of(config).mixture
        has_experts = [mixture is not None and mixture.in_layer(config, layer_idx) for layer_idx in layer_indices]
        fields[DENSE_LAYERS] = [number for number, has in enumerate(has_experts) if not has]
        fields[EXPERT_STEP] = 1
    if fields.get(FIRST_SPARSE) is not None and len(layer_indices) < config.num_hidden_layers:
        mixture = family_of(config).mixture
        has_experts = [mixture is not None and mixture.in_layer(config, layer_idx) for layer_idx in layer_indices]
        sparse = [number for number, has in enumerate(has_experts) if has]
        fields |= {FIRST_SPARSE: min(sparse, default=1), LAST_SPARSE: max(sparse, default=0), SPARSE_STEP: 1}
    if fields.get(FIRST_DENSE) is not None:
        fields[FIRST_DENSE] = sum(layer_idx < fields[FIRST_DENSE] for layer_idx in layer_indices)
    if fields.get("max_window_layers") is not None and len(layer_indices) < config.num_hidden_layers:
        # Layers from this one on have a sliding window. transformers 5 reads layer_types, other readers this.
        fields["max_window_layers"] = sum(layer_idx < fields["max_window_layers"] for layer_idx in layer_indices)
    return fields


def _stock_config(model_type: str, fields: dict[str, Any]) -> Any:
    """The stock config with these fields, or None where no stock class computes what the model computes."""
    try:
        return AutoConfig.for_model(model_type, **fields)
    except StrictDataclassError:
        if model_type != "llama" or fields.get("attention_bias") or fields.get("mlp_bias"):
            return None
    shared = {name: value for name, value in fields.items() if name not in LLAMA_ONLY_FIELDS}
    return AutoConfig.for_model("mistral", **shared, sliding_window=None)
