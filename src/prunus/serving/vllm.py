"""Entry point of the vLLM plugin: installed beside vLLM, prunus serves its models with it.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Nothing of vLLM is imported
before that, and the models themselves only when one is served.
"""

from __future__ import annotations

from prunus.checkpoint import register as register_with_transformers

__all__ = ["ARCHITECTURES", "register"]

#: class in `architectures` of a config.json → class that serves it
ARCHITECTURES: dict[str, str] = {
    "PrunusLlamaForCausalLM": "prunus.serving.vllm_models:RaggedLlamaForCausalLM",
    "PrunusMistralForCausalLM": "prunus.serving.vllm_models:RaggedMistralForCausalLM",
    "PrunusQwen2ForCausalLM": "prunus.serving.vllm_models:RaggedQwen2ForCausalLM",
    "PrunusQwen3ForCausalLM": "prunus.serving.vllm_models:RaggedQwen3ForCausalLM",
}


def register() -> None:
    """Tell vLLM which classes serve the architectures that prunus writes. Calling it again does no harm."""
    from vllm import ModelRegistry

    register_with_transformers()  # vLLM reads config.json through transformers
    for architecture, served_by in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, served_by)
