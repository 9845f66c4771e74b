"""Models whose decoder layers differ in width, made of vLLM's own classes.

One mechanism serves every family: while a model is built, its decoder layers are given a view of the configuration that
has their own widths, and blocks that the model lacks are then taken out. Attention, MLP, kernels, cache and weight
loading are vLLM's. What is needed of a family stands in `prunus.model.families` and in `SERVED`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.utils import extract_layer_index

from prunus.checkpoint.configuration_prunus import LayerConfig
from prunus.errors import UnsupportedModelError
from prunus.model.families import Block, family_of
from prunus.serving.vllm import ARCHITECTURES, SERVED, Served

__all__ = ["AbsentBlock", "AbsentNorm", "RaggedModel", "served_class"]

_WIDTH = {"attention": "num_key_value_heads", "mlp": "intermediate_size"}


class AbsentBlock(nn.Module):
    """Stands where a block was cut away whole: no parameters, no cache, the output is zero."""

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Zeros of the shape of `hidden_states`, (tokens, hidden_size)."""
        return torch.zeros_like(hidden_states)


class AbsentNorm(nn.Module):
    """Stands where a norm left with its block. What vLLM's norms add to the residual stream, it adds, too."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """`hidden_states` as they are; with a residual stream also the sum of both, as norms of vLLM answer."""
        return hidden_states if residual is None else (hidden_states, hidden_states + residual)


class RaggedModel(nn.Module):
    """Mixin of a language model of vLLM, with one set of widths per layer."""

    served: Served

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config, processes = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        with own_widths(self.served, config, processes):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer, block in _absent_blocks(self, config):
            self.take_out(layer, block, vllm_config.compilation_config.static_forward_context)

    def take_out(self, layer: Any, block: Block, caches: dict[str, Any]) -> None:
        """Take what was built in place of an absent block out of a decoder layer."""
        forget_cache(layer.get_submodule(block.module), caches)
        setattr(layer, block.module, AbsentBlock())
        for norm in block.norms:
            setattr(layer, norm, AbsentNorm())


class RaggedThroughTransformers(RaggedModel):
    """The same where vLLM runs the layers of transformers: those of prunus, which have their widths and lack blocks."""

    def _create_attention_instances(self: Any, prefix: str = "") -> None:
        widths, processes = self.config.layer_widths, self.parallel_config.tensor_parallel_size
        query_heads = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = [layer["num_key_value_heads"] or processes for layer in widths]
        self.model_config.model_arch_config.per_layer_overrides = [
            {"total_num_kv_heads": number, "total_num_attention_heads": number * query_heads} for number in heads
        ]
        for layer_idx, layer in enumerate(widths):
            if not layer["num_key_value_heads"]:  # vLLM wants an attention in every layer
                path = f"model.layers.{layer_idx}.self_attn"
                self.attention_fusers[layer_idx] = (path, AttentionFuser(source_cls="AbsentAttention"))
        super()._create_attention_instances(prefix)  # type: ignore[misc]

    def take_out(self, layer: Any, block: Block, caches: dict[str, Any]) -> None:
        """Take out the attention that `_create_attention_instances` had to make."""
        forget_cache(layer.get_submodule(block.module), caches)
        if block.axis == "attention":
            del layer.self_attn.attn


@contextmanager
def own_widths(served: Served, config: Any, processes: int) -> Iterator[None]:
    """Let every decoder layer that is built meanwhile see a configuration with its own widths.

    An absent block gets the smallest width that divides among the processes; it is taken out afterwards.
    """
    if served.layer is None:
        yield
        return
    layer_class = _vllm_class(served.layer)
    stock, signature = layer_class.__init__, inspect.signature(layer_class.__init__)
    fields, query_heads = served.fields(config), config.num_attention_heads // config.num_key_value_heads

    def build(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        widths = config.layer_widths[extract_layer_index(given.arguments["prefix"])]
        heads = widths["num_key_value_heads"] or processes
        given.arguments["config"] = LayerConfig(
            config,
            **fields,
            num_key_value_heads=heads,
            num_attention_heads=heads * query_heads,
            intermediate_size=widths["intermediate_size"] or processes,
        )
        stock(*given.args, **given.kwargs)

    layer_class.__init__ = build
    try:
        yield
    finally:
        layer_class.__init__ = stock


def forget_cache(block: nn.Module, caches: dict[str, Any]) -> None:
    """Attention announces itself when it is built, and would get a cache."""
    for module in block.modules():
        if isinstance(module, AttentionLayerBase):
            del caches[module.layer_name]


def _absent_blocks(model: nn.Module, config: Any) -> Iterator[tuple[nn.Module, Block]]:
    family = family_of(config)
    layers: Any = model.get_submodule(family.layers)
    for layer, widths in zip(layers, config.layer_widths, strict=True):
        for block in family.blocks:
            if not widths[_WIDTH[block.axis]] and hasattr(layer, block.module):  # else another process has the layer
                yield layer, block


def _vllm_class(name: str) -> Any:
    module, _, cls = name.partition(":")
    try:
        return getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), cls)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModelError(
            f"this vLLM has no {name} among its models; prunus knows those of vLLM 0.32"
        ) from error


@cache
def served_class(architecture: str) -> type[nn.Module]:
    """The class that serves an architecture.

    Args:
        architecture: a key of `ARCHITECTURES`.
    """
    served = SERVED[ARCHITECTURES[architecture]]
    mixin = RaggedModel if served.layer else RaggedThroughTransformers
    description = f"{served.model.partition(':')[2]} of vLLM with one set of widths per layer."
    attributes = {"__module__": __name__, "__doc__": description, "served": served}
    return type(architecture, (mixin, _vllm_class(served.model)), attributes)


def __getattr__(name: str) -> Any:
    """What vLLM looks up in this module, by the name of a class; only that one's module of vLLM is imported."""
    if name in ARCHITECTURES:
        return served_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
