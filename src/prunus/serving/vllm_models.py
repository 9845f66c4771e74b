"""Models whose decoder layers differ in width, made of vLLM's own layers.

Each layer is vLLM's, built from a copy of the configuration that holds its widths; attention, MLP, kernels, cache and
weight loading are vLLM's. A block that was cut away is not there: no weights, no cache, no arithmetic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index

from prunus.errors import UnsupportedModelError

__all__ = [
    "RaggedLlamaForCausalLM",
    "RaggedMistralForCausalLM",
    "RaggedQwen2ForCausalLM",
    "RaggedQwen3ForCausalLM",
]


class RaggedLayer(nn.Module):
    """Mixin of a decoder layer of vLLM that lacks the blocks its model lacks."""

    def drop_absent_blocks(self: Any, vllm_config: VllmConfig, prefix: str) -> None:
        """Take away what the constructor built in place of an absent block."""
        widths = vllm_config.model_config.hf_config.layer_widths[extract_layer_index(prefix)]
        self.has_attention, self.has_mlp = bool(widths["num_key_value_heads"]), bool(widths["intermediate_size"])
        if not self.has_attention:
            # Attention announces itself when it is built, and would get a cache.
            del vllm_config.compilation_config.static_forward_context[f"{prefix}.self_attn.attn"]
            del self.self_attn, self.input_layernorm
        if not self.has_mlp:
            del self.mlp, self.post_attention_layernorm

    def forward(
        self: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """In vLLM's order of things: what a block adds is added to the residual stream by the norm that comes next."""
        if self.has_attention:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.has_mlp:
            hidden_states, residual = _normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class RaggedLlamaLayer(RaggedLayer, LlamaDecoderLayer):
    """Decoder layer of Llama and Mistral."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        LlamaDecoderLayer.__init__(self, vllm_config, prefix, config=self.layer_config(vllm_config, prefix))
        self.drop_absent_blocks(vllm_config, prefix)

    def layer_config(self, vllm_config: VllmConfig, prefix: str) -> Any:
        """The configuration with this layer's widths."""
        return vllm_config.model_config.hf_config.layer_config(extract_layer_index(prefix))


class RaggedQwen2Layer(RaggedLlamaLayer):
    """Decoder layer of Qwen2: Llama's, with biases of queries, keys and values.

    vLLM's own takes the heads to span the hidden size, which they do not once some are cut.
    """

    def layer_config(self, vllm_config: VllmConfig, prefix: str) -> Any:
        """The configuration with this layer's widths, in the words of vLLM's Llama."""
        config = super().layer_config(vllm_config, prefix)
        config.qkv_bias = True
        return config


class RaggedQwen3Layer(RaggedLayer, Qwen3DecoderLayer):
    """Decoder layer of Qwen3."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config.layer_config(extract_layer_index(prefix))
        Qwen3DecoderLayer.__init__(
            self,
            config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.drop_absent_blocks(vllm_config, prefix)


class RaggedLlamaForCausalLM(LlamaForCausalLM):
    """Llama with one set of widths per layer."""

    layer_type: type[nn.Module] = RaggedLlamaLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        processes = vllm_config.parallel_config.tensor_parallel_size
        if processes != 1:
            raise UnsupportedModelError(
                f"tensor_parallel_size is {processes}; the heads of a model whose layers differ in width do not divide "
                "among processes. Serve it with 1, or write it with equal layers: ``prunus export --to dense``"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_type)


class RaggedMistralForCausalLM(RaggedLlamaForCausalLM):
    """Mistral with one set of widths per layer; its arithmetic is Llama's."""


class RaggedQwen2ForCausalLM(RaggedLlamaForCausalLM):
    """Qwen2 with one set of widths per layer."""

    layer_type = RaggedQwen2Layer


class RaggedQwen3ForCausalLM(RaggedLlamaForCausalLM):
    """Qwen3 with one set of widths per layer: Llama's model around Qwen3's layers."""

    layer_type = RaggedQwen3Layer


def _normed(norm: nn.Module, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add what the last block gave to the residual stream, and norm the sum."""
    if residual is None:
        return norm(hidden_states), hidden_states
    hidden_states, residual = norm(hidden_states, residual)
    return hidden_states, residual
