"""A small model of every family, and ways to cut it, for llama_cpp_families.py, vllm_families.py and mlx_check.py.

Six layers of random weights from config. Weights are large enough for the logits to differ,
or else every greedy token would be a tie, and norms and biases are random, too, or else it would not show where one of
them is left out. Mixtures have eight experts in a layer, of which two work on a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prunus.model.families import FAMILIES
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

LAYERS, GROUPS, CHANNELS, HIDDEN, SEED = 6, 3, 512, 384, 0
EXPERTS, EXPERT_CHANNELS, SHARED_CHANNELS = 8, 128, 256
BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2 * GROUPS,
    "num_key_value_heads": GROUPS,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
#: head_dim times heads is the hidden size where a config has no head_dim
DERIVED = {"head_dim": None}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 48}
#: up to max_position_embeddings
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64}
#: what yarn takes for granted
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
#: experts add little beside tied embeddings, and weights of dense models would leave it at that
_MIXTURE = {"tie_word_embeddings": False, "initializer_range": 0.12, "num_experts_per_tok": 2}
#: of a mixture that has a field for the width of experts, and of one whose only width that is
_APART = {**_MIXTURE, "num_experts": EXPERTS, "moe_intermediate_size": EXPERT_CHANNELS}
_ONLY = {**_MIXTURE, "num_local_experts": EXPERTS, "intermediate_size": EXPERT_CHANNELS}
_GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0156,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
#: what a family's odd features need, as far as published models have them
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"sliding_window": None},
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5}},
    "granite": {**DERIVED, **_GRANITE},
    "smollm3": {**DERIVED, "no_rope_layer_interval": 4},
    "olmo2": DERIVED,
    "olmo3": {
        **DERIVED,
        "sliding_window": 48,
        "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
        "rope_parameters": {_FULL: _YARN, _SLIDING: {"rope_type": "default", "rope_theta": 1e4}},
    },
    "exaone4": {
        **DERIVED,
        "sliding_window": 48,
        "sliding_window_pattern": "LLLG",
        "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL, _SLIDING, _SLIDING],
    },
    "phi3": {**DERIVED, "original_max_position_embeddings": 1024},
    "glm": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "seed_oss": {"attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "hunyuan_v1_dense": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0},
    },
    "gemma2": {**_GEMMA, "sliding_window_pattern": 2},
    "gemma3_text": {
        **_GEMMA,
        "sliding_window_pattern": 6,
        "rope_parameters": {
            _FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "qwen3_moe": {**_APART, "norm_topk_prob": True},
    "olmoe": {**DERIVED, **_APART, "moe_intermediate_size": None, "intermediate_size": EXPERT_CHANNELS},
    "mixtral": {**_ONLY, "sliding_window": None},
    "qwen2_moe": {**DERIVED, **_APART, "shared_expert_intermediate_size": SHARED_CHANNELS},
    "granitemoe": {**DERIVED, **_ONLY, **_GRANITE},
    "gpt_oss": {**_ONLY, "sliding_window": 48, "rope_parameters": {**_YARN, **_BETAS, "truncate": False}},
    "glm4_moe": {
        **_APART,
        "num_experts": None,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "ernie4_5_moe": {
        **_MIXTURE,
        "num_experts_per_tok": None,
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": EXPERT_CHANNELS,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
}
#: family → factor on its embeddings; tied ones that it scales up again would make every token follow itself
EMBEDDINGS = {"granite": 0.25, "gemma": 0.25, "gemma2": 0.25, "gemma3_text": 0.25}


#: shapes that dense models alone can have, and those that mixtures alone can have
_OF_DENSE, _OF_MIXTURES = (
    frozenset({"ragged", "dense", "tensor parallel", "tensor parallel, odd"}),
    frozenset({"experts"}),
)


def has_shape(family: str, shape: str) -> bool:
    """Whether models of a family can be cut to a shape: layers of mixtures are equal, and have experts to lose."""
    return shape not in (_OF_DENSE if FAMILIES[family].mixture else _OF_MIXTURES)


def dense_model(family: str, vocab_size: int, **changes: Any) -> Any:
    """The model before it is cut, in float32.

    Args:
        family: a model type.
        vocab_size: rows of its embeddings.
        changes: fields of its config beside those above.
    """
    fields: dict[str, Any] = {**BASE, "vocab_size": vocab_size, **FIELDS.get(family, {}), **changes}
    fields = {name: value for name, value in fields.items() if value is not None or name == "sliding_window"}
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32).eval()
    norm = 1.0 - FAMILIES[family].norm_offset
    with torch.no_grad():
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if (tensor.ndim == 1 or "bias" in name) and "inv_freq" not in name:
                tensor.normal_(mean=norm if "norm" in name else 0.0, std=0.1)
        model.get_input_embeddings().weight.mul_(EMBEDDINGS.get(family, 1.0))
    return model


def ragged_plan(geometry: Geometry, *, keeps_layers: bool = False, even: bool = False) -> Plan:
    """Layer 0 without attention, 1 without channels, 3 gone altogether, the others of different widths.

    Args:
        geometry: of a model above.
        keeps_layers: no layer goes altogether, for a program that tells layers by their numbers.
        even: numbers of groups and channels are even, for two processes.
    """
    kept: list[dict[Any, Any]] = [
        {"attention": [], "mlp": range(3, 401 if even else 400)},
        {"attention": [0, 2], "mlp": []},
        {"attention": [1, 2] if even else [1], "mlp": range(100)},
        {"attention": [0] if keeps_layers else [], "mlp": range(5) if keeps_layers else []},
        {"attention": [1, 2], "mlp": range(0, CHANNELS, 2)},
        {"attention": [0, 1] if even else [0, 1, 2], "mlp": range(450)},
    ]
    return _plan(geometry, kept)


def uniform_plan(geometry: Geometry) -> Plan:
    """Two of three attention groups, 320 channels and five of eight experts in every layer, others in each.

    Shared experts stay whole: no stock class has fewer channels in them.
    """
    return _plan(
        geometry,
        [
            {
                "attention": sorted({layer % GROUPS, (layer + 1) % GROUPS}),
                "mlp": range(widths["mlp"]) if widths["expert"] else range(layer, layer + 320),
                "expert": _some_experts(layer) if widths["expert"] else [],
            }
            for layer, widths in enumerate(geometry.widths)
        ],
    )


def experts_plan(geometry: Geometry) -> Plan:
    """Five of eight experts in every layer that has some, others in each; the rest whole."""
    return _plan(
        geometry,
        [
            {**_whole(geometry, layer), "expert": _some_experts(layer) if widths["expert"] else []}
            for layer, widths in enumerate(geometry.widths)
        ],
    )


def depth_plan(geometry: Geometry) -> Plan:
    """Layer 3 gone, all others whole."""
    return _plan(geometry, [{} if layer == 3 else _whole(geometry, layer) for layer in range(LAYERS)])


def _some_experts(layer: int) -> list[int]:
    return sorted((layer + step) % EXPERTS for step in (0, 2, 3, 5, 6))


def _whole(geometry: Geometry, layer: int) -> dict[str, Sequence[int]]:
    return {axis: range(geometry.widths[layer][axis]) for axis in geometry.axes}


def _plan(geometry: Geometry, kept: Sequence[Mapping[str, Sequence[int]]]) -> Plan:
    groups = geometry.widths[0].num_key_value_heads
    if geometry.family.block("attention").indivisible:
        kept = [{**layer, "attention": range(groups) if layer.get("attention") else []} for layer in kept]
    return Plan.from_kept(geometry, [{axis: layer.get(axis, ()) for axis in geometry.axes} for layer in kept])
