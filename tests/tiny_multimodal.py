"""Tiny multimodal models of random weights, with an image in their prompts, and the same models with groups masked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from tiny_families import BASE, GQA, YARN, plan_keeping
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from prunus.model.geometry import Geometry
from prunus.selection.plan import KeptGroups, Plan

LAYERS, GROUPS, CHANNELS = 4, 3, 20
IMAGE, BEGIN, END, VIDEO = 90, 91, 92, 93
TEXT: dict[str, Any] = {**BASE, **GQA, "num_hidden_layers": LAYERS}
_TOWER = {"hidden_size": 32, "intermediate_size": 40, "patch_size": 4}
_QWEN_TOWER = {
    **_TOWER,
    "depth": 3,
    "num_heads": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": TEXT["hidden_size"],
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
_IN_SPACE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
#: as in Ministral 3: queries are scaled by their position, too
SCALED = {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}

#: model type → fields of its config
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 6, "query_pre_attn_scalar": 16},
        "vision_config": {
            **_TOWER,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": BEGIN,
        "eoi_token_index": END,
        "tie_word_embeddings": True,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "ministral3", "rope_parameters": SCALED},
        "vision_config": {
            **_TOWER,
            "model_type": "pixtral",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 8,
            "image_size": 16,
        },
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        **_QWEN_TOKENS,
        "text_config": {
            **TEXT,
            "model_type": "qwen3_vl_text",
            "rope_parameters": {**_IN_SPACE, "mrope_interleaved": True},
        },
        # Features of the image go into the first two decoder layers as well.
        "vision_config": {
            **_QWEN_TOWER,
            "model_type": "qwen3_vl_vision",
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": {
        **_QWEN_TOKENS,
        "text_config": {
            **{name: value for name, value in TEXT.items() if name != "head_dim"},
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": _IN_SPACE,
        },
        "vision_config": {
            **_QWEN_TOWER,
            "model_type": "qwen2_5_vl_vision",
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": False,
    },
}
WHOLE = {"attention": range(GROUPS), "mlp": range(CHANNELS)}


@lru_cache(maxsize=8)
def multimodal(model_type: str) -> Any:
    """A model for many tests, which must leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        norm = 0.0 if model_type == "gemma3" else 1.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(norm if "norm" in name else 0.0, 0.2)
    model.tie_weights()
    return model


def prompt(model_type: str) -> dict[str, Tensor]:
    """Token ids with an image among them, as the processor of the model would make them."""
    generator = torch.Generator().manual_seed(3)
    around = (1, 5, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9)
    input_ids = torch.tensor([around])
    image = torch.randn(1, 3, 16, 16, generator=generator)
    if model_type == "gemma3":
        return {"input_ids": input_ids, "pixel_values": image, "token_type_ids": (input_ids == IMAGE).long()}
    if model_type == "mistral3":
        return {"input_ids": input_ids, "pixel_values": image, "image_sizes": torch.tensor([[16, 16]])}
    input_ids = torch.tensor([(1, 5, BEGIN, *around[2:6], END, 7, 8, 9)])
    return {
        "input_ids": input_ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
    }


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def masked(model: Any, kept: Sequence[KeptGroups]) -> Any:
    """The multimodal model at full size, with the output columns of every group that is not kept set to zero."""
    oracle = copy.deepcopy(model)
    for layer, groups in zip(oracle.model.language_model.layers, kept, strict=True):
        for axis, projection, total in (
            ("attention", layer.self_attn.o_proj, GROUPS),
            ("mlp", layer.mlp.down_proj, CHANNELS),
        ):
            width = projection.in_features // total
            for group in set(range(total)) - set(groups[axis]):
                projection.weight.data[:, group * width : (group + 1) * width] = 0
    return oracle


def plan_of(language_model: Any, shape: str) -> Plan:
    """A plan for the language model of one of the models; attention is cut where the class has room for that."""
    heads = language_model.config.model_type.removeprefix("prunus_") != "qwen2"
    some = (lambda *groups: groups) if heads else (lambda *groups: range(GROUPS))
    kept = {
        "everything": [WHOLE] * LAYERS,
        "uniform": [{"attention": some(0, 2), "mlp": range(i, i + 12)} for i in range(LAYERS)],
        "ragged": [
            {"attention": some(1), "mlp": range(7)},
            {"attention": some(), "mlp": [1, 2]},
            {"attention": [], "mlp": []},
            {"attention": some(0, 2), "mlp": []},
        ],
    }
    return plan_keeping(Geometry.of(language_model), kept[shape])
