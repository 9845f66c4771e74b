"""What a GGUF file says of its model before the tensors."""

from __future__ import annotations

import logging
from typing import Any

from prunus.escaping import printable
from prunus.export.gguf_model import GgufModel
from prunus.export.gguf_rope import Rope
from prunus.export.llama_cpp import Architecture, expert_channels
from prunus.model.families import Mixture

__all__ = ["write_metadata"]

logger = logging.getLogger(__name__)


def write_metadata(writer: Any, gguf: Any, described: GgufModel, name: str) -> None:
    """Write what a file says of its model, but for the tokenizer.

    Args:
        writer: of gguf.
        gguf: the package.
        described: the model.
        name: its name, as the file shows it.
    """
    config, architecture, rope = described.model.config, described.architecture, described.rope
    head_dim, layers = described.geometry.head_dim, len(described.widths)

    def per_layer(values: list[int]) -> list[int] | int:
        return values if architecture.per_layer else values[0]

    writer.add_type("model")
    writer.add_name(printable(name))
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[described.type]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(layers)
    writer.add_context_length(_context(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(per_layer(described.heads))
    writer.add_head_count_kv(per_layer(described.key_value_heads))
    writer.add_feed_forward_length(per_layer(described.channels))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, field in architecture.fields.items():
        if (value := getattr(config, field)) is not None:
            add[type(value)](f"{architecture.name}.{key}", value)
    if described.geometry.family.mixture is not None:
        _add_experts(writer, config, described.geometry.family.mixture)
    _add_kinds(writer, config, architecture)
    _add_rope(writer, gguf, architecture, rope)


def _add_experts(writer: Any, config: Any, mixture: Mixture) -> None:
    writer.add_expert_count(getattr(config, mixture.count))
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(expert_channels(config))
    if shared := mixture.shared_channels(config):
        writer.add_expert_shared_feed_forward_length(shared)


def _add_rope(writer: Any, gguf: Any, architecture: Architecture, rope: Rope) -> None:
    writer.add_rope_dimension_count(rope.dimensions)
    writer.add_rope_freq_base(rope.base)
    if rope.window_base is not None:
        writer.add_float32(f"{architecture.name}.rope.freq_base_swa", rope.window_base)
    if rope.position_scale:
        writer.add_float32(f"{architecture.name}.attention.temperature_scale", rope.position_scale)
    if rope.scaling:
        writer.add_rope_scaling_type(getattr(gguf.RopeScalingType, rope.scaling.upper()))
    for setting, add in (
        ("factor", writer.add_rope_scaling_factor),
        ("original_max_position_embeddings", lambda value: writer.add_rope_scaling_orig_ctx_len(int(value))),
        ("attention_factor", writer.add_rope_scaling_attn_factors),
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.settings and setting in rope.settings:
            add(rope.settings[setting])


def _add_kinds(writer: Any, config: Any, architecture: Architecture) -> None:
    """Say for every layer of which kind it is, where llama.cpp would take it to be of another."""
    kinds = architecture.kinds
    if kinds is None or kinds.key is None or not architecture.has_windows(config):
        return
    found = kinds.of_model(config)
    if found != kinds.of_llama_cpp(len(found)):
        key = f"{architecture.name}.{kinds.key}"
        logger.warning(
            "which layers have %s is not what llama.cpp takes for granted, and is said in %s: a llama.cpp that is too "
            "old to read it (llama-cpp-python 0.3.36 is not) computes something else",
            kinds.what,
            key,
        )
        writer.add_array(key, found)


def _context(config: Any, architecture: Architecture) -> int:
    """Positions up to which the file computes what the model computes."""
    window = None if architecture.windows else getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        window = None
    if window is None or window >= config.max_position_embeddings:
        return int(config.max_position_embeddings)
    logger.warning(
        "the model's layers look back %d tokens, and llama.cpp's graph for it has no such window: the context length "
        "in the file is %d, up to which both compute the same",
        window,
        window,
    )
    return int(window)
