"""Entry point of the vLLM plugin: installed beside vLLM, prunus serves its models with it.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Nothing of vLLM is imported
before that, and the models themselves only when one is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunus.checkpoint import register as register_with_transformers
from prunus.checkpoint.configuration_prunus import CONFIGURATIONS
from prunus.errors import UnsupportedModelError
from prunus.model.families import PRUNED_PREFIX, family_of
from prunus.serving.tensor_parallel import check_divides

__all__ = ["ARCHITECTURES", "SERVED", "Served", "check_served", "register"]


@dataclass(frozen=True)
class Served:
    """The classes of vLLM that compute what a family computes, as `module:Class` below `vllm.model_executor.models`.

    Attributes:
        model: the language model.
        layer: its decoder layer, which takes its widths from a config; None where vLLM runs the layers of
            transformers, and so those of prunus.
        fields: config → what that layer has other names for, or takes for granted, in its words.
    """

    model: str
    layer: str | None = None
    fields: Callable[[Any], Mapping[str, Any]] = lambda config: {}


def _position_scale(config: Any) -> Mapping[str, Any]:
    rope = config.rope_parameters
    if not rope.get("llama_4_scaling_beta"):
        return {}
    names = {"beta": "llama_4_scaling_beta", "original_max_position_embeddings": "original_max_position_embeddings"}
    return {"llama_4_scaling": {theirs: rope[ours] for theirs, ours in names.items()}}


_TRANSFORMERS = Served("transformers:TransformersForCausalLM")
_LLAMA_LAYER = "llama:LlamaDecoderLayer"

#: family → how vLLM serves it
SERVED: dict[str, Served] = {
    "llama": Served("llama:LlamaForCausalLM", _LLAMA_LAYER),
    "mistral": Served("mistral:MistralForCausalLM", "mistral:MistralDecoderLayer"),
    "ministral3": Served("mistral:MistralForCausalLM", "mistral:MistralDecoderLayer", _position_scale),
    # vLLM's own layer takes the heads to span the hidden size, which they do not once some are cut.
    "qwen2": Served("llama:LlamaForCausalLM", _LLAMA_LAYER, lambda config: {"qkv_bias": True}),
    "qwen3": Served("qwen3:Qwen3ForCausalLM", "qwen3:Qwen3DecoderLayer"),
    "granite": Served("granite:GraniteForCausalLM", "granite:GraniteDecoderLayer"),
    "smollm3": _TRANSFORMERS,
    "olmo2": _TRANSFORMERS,
    "olmo3": _TRANSFORMERS,
    "exaone4": Served("exaone4:Exaone4ForCausalLM", "exaone4:Exaone4DecoderLayer"),
    "phi3": Served("phi3:Phi3ForCausalLM", _LLAMA_LAYER),
    "glm": _TRANSFORMERS,
    "glm4": Served("glm4:Glm4ForCausalLM", "glm4:Glm4DecoderLayer"),
    "seed_oss": Served(
        "llama:LlamaForCausalLM",
        _LLAMA_LAYER,
        lambda config: {"qkv_bias": config.attention_bias, "attention_bias": config.attention_out_bias},
    ),
    "ernie4_5": Served("ernie45:Ernie4_5ForCausalLM", _LLAMA_LAYER),
    "hunyuan_v1_dense": _TRANSFORMERS,
    "gemma": Served("gemma:GemmaForCausalLM", "gemma:GemmaDecoderLayer"),
    "gemma2": Served("gemma2:Gemma2ForCausalLM", "gemma2:Gemma2DecoderLayer"),
    "gemma3_text": Served("gemma3:Gemma3ForCausalLM", "gemma3:Gemma3DecoderLayer"),
}

#: class in `architectures` of a config.json → family
ARCHITECTURES: dict[str, str] = {
    f"Prunus{name}ForCausalLM": family
    for name, configuration in CONFIGURATIONS.items()
    if (family := configuration.model_type.removeprefix(PRUNED_PREFIX)) in SERVED
}


def register() -> None:
    """Tell vLLM which classes serve the architectures that prunus writes. Calling it again does no harm."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class CheckedConfig(VerifyAndUpdateConfig):  # type: ignore[misc,unused-ignore]
        """Refuses in the process that the user started, where a model's own refusal would be an error of a worker."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_served(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)

    register_with_transformers()  # vLLM reads config.json through transformers
    for architecture in ARCHITECTURES:
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, f"prunus.serving.vllm_models:{architecture}")
        MODELS_CONFIG_MAP.setdefault(architecture, CheckedConfig)


def check_served(config: Any, processes: int) -> None:
    """Check that a model can be served by so many processes that share each layer.

    Args:
        config: with `layer_widths`.
        processes: of tensor parallelism.

    Raises:
        UnsupportedModelError: see `check_divides`; or vLLM runs its family's layers as transformers has them.
    """
    family = family_of(config).model_type
    if processes > 1 and SERVED[family].layer is None:
        raise UnsupportedModelError(
            f"tensor_parallel_size is {processes}, and vLLM has no class of its own for {family!r}: it runs the layers "
            "of transformers, which prunus does not share among processes. Serve the model with 1"
        )
    check_divides(config, processes)
