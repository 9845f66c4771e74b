"""What transformers knows of a model type that no family describes: said in the error, instead of a guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

__all__ = ["fields_of", "what_is_known"]

#: config fields that say how many experts a layer has; a dense model of such a type has none
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: config fields that list the kind of each layer
LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")
#: kinds of layers, and beginnings of fields, of models that carry a state from token to token instead of attention
STATE_KINDS = ("mamba", "linear_attention", "recurrent", "conv", "ssm")
STATE_FIELDS = ("mamba_", "ssm_", "state_size", "time_step_rank", "linear_conv_kernel_dim", "conv_L_cache")
STATE_NAMES = ("mamba", "rwkv", "xlstm", "recurrent")
#: config fields in which a multimodal model keeps the config of its language model
TEXT_PARTS = ("text_config", "language_config", "llm_config", "thinker_config", "text_model_config")


def fields_of(config: Any) -> Mapping[str, Any]:
    """The fields of a config, an object or a dict."""
    # Not getattr: configs of some mixtures refuse to name fields whose values differ by layer.
    return config if isinstance(config, dict) else getattr(config, "__dict__", {})


def what_is_known(config: Any) -> str:
    """What kind of model a config describes, as the end of a sentence "it is …"; empty if nothing is known.

    Args:
        config: a config of transformers, or the content of a config.json.
    """
    fields = fields_of(config)
    model_type = str(fields.get("model_type") or getattr(config, "model_type", ""))
    if not model_type:
        return ""
    # Not get(): that of this lazy mapping finds nothing.
    stock: Any = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401

    def value(name: str) -> Any:
        return fields[name] if name in fields else getattr(stock, name, None)

    parts = getattr(stock, "sub_configs", None) or {}
    if (part := next((name for name in TEXT_PARTS if fields.get(name) or name in parts), None)) is not None:
        text = fields_of(fields.get(part)) if fields.get(part) is not None else {}
        inner = text.get("model_type") or getattr(parts.get(part), "model_type", "")
        known = what_is_known({**text, "model_type": inner}) if inner else ""
        return f"a multimodal wrapper, whose text part ({part}) is of type {inner!r}" + (known and f": {known}")
    nested = (fields_of(part) for part in fields.values() if isinstance(part, dict | PreTrainedConfig))
    counts = [part[name] for part in (fields, *nested) for name in EXPERT_COUNTS if name in part] or [
        count for name in EXPERT_COUNTS if isinstance(count := getattr(stock, name, None), int)
    ]
    if any(counts) or (not counts and ("moe" in model_type or value("num_experts_per_tok"))):
        return "a mixture of experts"
    kinds = next((fields[name] for name in LAYER_KINDS if isinstance(fields.get(name), list)), None)
    names = {*fields, *getattr(stock, "__annotations__", {})}
    if (
        any(name in model_type for name in STATE_NAMES)
        if kinds is None and not any(name.startswith(STATE_FIELDS) for name in names)
        else kinds is None or any(str(kind).startswith(STATE_KINDS) for kind in kinds)
    ):
        return "a state-space or recurrent model, or a hybrid with one: its layers are not attention and MLP alone"
    if value("is_encoder_decoder") is True:
        return "an encoder-decoder model"
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder, which predicts masked tokens"
    if stock is None:
        return "one that this version of transformers does not know either"
    return "a dense model of a type made for mixtures of experts, in modules of its own" if counts else ""
