"""Tiny models of every family, and what a cut must do to them, written down apart from the package.

A new family needs an entry in `VARIANTS`; the conformance suite then runs on it by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from prunus.calibration import Batch
from prunus.model.families import AXES, FAMILIES, Block, Family
from prunus.model.geometry import Geometry
from prunus.selection.plan import KeptGroups, Plan

VOCABULARY, HIDDEN, HEAD_DIM, CHANNELS = 96, 48, 8, 20

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 3}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
MQA = {"num_attention_heads": 4, "num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
#: as in Llama 3.2
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2}
#: as published: `head_dim` is no field of this family's config, and follows from the number of heads
DERIVED_HEADS = {"head_dim": None}
#: a sliding window in every second layer
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 6, "sliding_window_pattern": 2}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.5,
}

#: model type → variant → fields of its config; together they cover head layouts, ties, biases and head sizes
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "gqa": GQA,
        "mha-tied": {**MHA, **TIED, "rope_parameters": LLAMA3_ROPE},
        "mqa-biases": {**MQA, "attention_bias": True, "mlp_bias": True},
        "gqa-biases": {**GQA, "attention_bias": True, "mlp_bias": True},
    },
    "mistral": {
        "gqa-tied": {**GQA, **TIED, "sliding_window": None},
        "mha": {**MHA, "sliding_window": None},
        "mqa-window": {**MQA, "sliding_window": 6},
    },
    "qwen2": {
        "gqa-tied": {**GQA, **TIED},
        "mha": MHA,
        # A sliding window in layer 1 alone: what is left of the layers has to keep its own kind of attention.
        "mqa-window": {**MQA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    },
    "qwen3": {
        "gqa-wide-heads": {**GQA, "head_dim": 12},
        "mha-narrow-heads-tied": {**MHA, **TIED, "head_dim": 6},
        "mqa-biases": {**MQA, "attention_bias": True},
    },
    # A head layout is a matter of the projections: those above stand for all families that have the same ones.
    "granite": {
        "gqa-tied-biases": {**GQA, **TIED, **GRANITE, **DERIVED_HEADS, "attention_bias": True, "mlp_bias": True}
    },
    "smollm3": {
        # No positions but a sliding window in every second layer.
        "gqa": {**GQA, **DERIVED_HEADS, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    },
    # Norms over all heads' queries and keys: attention goes whole.
    "olmo2": {
        "gqa-tied-biases": {**GQA, **TIED, **DERIVED_HEADS, "attention_bias": True},
        "mha": {**MHA, "head_dim": None},
    },
    "phi3": {
        "gqa-half-rotary": {
            **GQA,
            **DERIVED_HEADS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        "mha-tied-window": {**MHA, **TIED, **DERIVED_HEADS, "sliding_window": 6},
        "mqa-longrope": {
            **MQA,
            **DERIVED_HEADS,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            },
        },
    },
    # The same norms, and a window in layer 0 with rotary positions of its own.
    "olmo3": {
        "gqa-window": {
            **GQA,
            **DERIVED_HEADS,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    },
    # Norms per head, and positions in the layer with a window only.
    "exaone4": {
        "gqa-window-tied": {
            **GQA,
            **TIED,
            **DERIVED_HEADS,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
        },
    },
    "glm": {
        "gqa-narrow-rotary": {**GQA, "attention_bias": True, "partial_rotary_factor": 0.25},
        "mha-tied": {**MHA, **TIED, "attention_bias": False},
    },
    "glm4": {"gqa-biases": {**GQA, "attention_bias": True}, "mqa": {**MQA, "attention_bias": True}},
    "seed_oss": {
        "gqa-biases": {
            **GQA,
            "attention_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            # By default it drops a tenth of all that blocks add, in training.
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
    },
    "ernie4_5": {"gqa-tied-biases": {**GQA, **TIED, "use_bias": True}},
    "hunyuan_v1_dense": {
        "gqa-biases-alpha": {
            **GQA,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0},
        },
    },
    # Queries are scaled by their position, from the eighth on.
    "ministral3": {
        "gqa-tied": {
            **GQA,
            **TIED,
            "rope_parameters": {
                **YARN,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.5,
            },
        },
    },
    "gemma": {"gqa-tied-wide-heads": {**GQA, **TIED, "head_dim": 12, "attention_bias": True}},
    "gemma2": {"gqa-tied": {**GQA, **TIED, **GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}},
    "gemma3_text": {
        "gqa-wide-heads": {
            **GQA,
            **GEMMA,
            "head_dim": 12,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    },
}

#: families without experts; those with some have tiny models of their own (tests/tiny_mixtures.py)
DENSE: dict[str, Family] = {name: family for name, family in FAMILIES.items() if family.mixture is None}
#: every dense family of the registry with each of its variants; a family that has none is listed too, so that it fails
CASES: list[tuple[str, str]] = [
    (model_type, variant) for model_type in DENSE for variant in VARIANTS.get(model_type, {"missing": {}})
]
#: one variant per family, for what does not depend on the variant
ONE_EACH: list[tuple[str, str]] = [next(case for case in CASES if case[0] == model_type) for model_type in DENSE]
#: the first of the families that are described alike → its description. What prunus does with a model, it does by the
#: description alone: every family is needed where the model's own class takes part.
_UNLIKE = {replace(FAMILIES[case[0]], model_type="", title="", notes=""): case[0] for case in reversed(ONE_EACH)}
#: variants of families that are described differently
UNLIKE: list[tuple[str, str]] = [case for case in CASES if case[0] in _UNLIKE.values()]
#: one variant of each of these
ONE_UNLIKE: list[tuple[str, str]] = [case for case in ONE_EACH if case in UNLIKE]


def case_id(case: tuple[str, str]) -> str:
    return "-".join(case)


def tiny_config(model_type: str, variant: str, **fields: Any) -> Any:
    """The config of a variant, with some fields changed."""
    if model_type not in VARIANTS:
        pytest.fail(
            f"family {model_type!r} has no tiny model to be tested on: add an entry to VARIANTS in "
            "tests/tiny_families.py, with GQA, MHA and MQA, tied and untied embeddings, and its biases if it has any"
        )
    fields = {**BASE, **VARIANTS[model_type][variant], **fields}
    if fields["head_dim"] is None:
        del fields["head_dim"]
    if "layer_types" in fields:  # of more layers, the same again
        fields["layer_types"] = [*islice(cycle(fields["layer_types"]), fields["num_hidden_layers"])]
    return AutoConfig.for_model(model_type, **fields)


def head_dim_of(config: Any) -> int:
    """Width of a head: stated, or what the hidden size leaves for each."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def make_model(model_type: str, variant: str | None = None, *, seed: int = 0, **fields: Any) -> Any:
    """A model of random weights in which every weight, norm and bias matters."""
    config = tiny_config(model_type, variant or next(iter(VARIANTS[model_type])), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        norm = 1.0 - FAMILIES[model_type].norm_offset
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=norm if "norm" in name else 0.0, std=0.25)
    model.tie_weights()
    return model


@lru_cache(maxsize=64)
def shared_model(model_type: str, variant: str) -> Any:
    """The same model for many tests, which must leave it as it is."""
    return make_model(model_type, variant)


def random_tokens(batch: int = 2, seq_len: int = 12, seed: int = 1) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def padded_batches() -> list[Batch]:
    """Two batches, one of them padded on the right and one on the left."""
    ids = random_tokens(batch=5, seq_len=14)
    masks = torch.ones_like(ids)
    masks[1, 9:] = 0
    masks[3, :4] = 0
    return [Batch(ids[:3], masks[:3]), Batch(ids[3:], masks[3:])]


def logits(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def undivided(block: Block, kept: Sequence[int], groups: int) -> Sequence[int]:
    """What a block of so many groups keeps where it should keep these: all of them, if it is indivisible."""
    return range(groups) if block.indivisible and len(kept) else kept


def plan_keeping(geometry: Geometry, kept: Sequence[dict[Any, Sequence[int]]]) -> Plan:
    """The plan that keeps these groups of every layer, and the rest of indivisible blocks."""
    return Plan.from_kept(
        geometry,
        [
            {axis: undivided(geometry.family.block(axis), layer[axis], widths[axis]) for axis in AXES}
            for widths, layer in zip(geometry.widths, kept, strict=True)
        ],
    )


def count_parameters(model: Any) -> int:
    """Parameters, tied ones once, counted one storage at a time."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


def zeroed(model: Any, kept: Sequence[KeptGroups]) -> Any:
    """The model at full size with the output columns of every group that is not kept set to zero.

    The output bias of a block is nobody's as long as the block is there, and goes with it.
    """
    oracle = copy.deepcopy(model)
    family = FAMILIES[model.config.model_type.removeprefix("prunus_")]
    for layer, groups in zip(oracle.get_submodule(family.layers), kept, strict=True):
        for block in family.blocks:
            if not any(True for _ in layer.get_submodule(block.module).parameters()):
                continue  # was cut away before
            projection = layer.get_submodule(block.output.path)
            total = groups_of(layer, block.axis, model.config)
            width = projection.in_features // total
            for group in set(range(total)) - set(groups[block.axis]):
                projection.weight.data[:, group * width : (group + 1) * width] = 0
            if not groups[block.axis] and projection.bias is not None:
                projection.bias.data.zero_()
    return oracle


def groups_of(layer: Any, axis: str, config: Any) -> int:
    """How many groups a decoder layer has, read off the shape of its weights."""
    if axis == "attention":
        query_heads = config.num_attention_heads // config.num_key_value_heads
        width = query_heads * head_dim_of(config)
        return layer.self_attn.o_proj.in_features // width if hasattr(layer.self_attn, "o_proj") else 0
    return layer.mlp.down_proj.in_features if hasattr(layer.mlp, "down_proj") else 0


def weights_of_group(layer: Any, axis: str, group: int, config: Any) -> Iterator[tuple[str, Any]]:
    """Where the weights of a group are: names inside the decoder layer, with an index into each parameter.

    Spelt out by hand for decoder layers with separate projections, and for those of Phi-3. A family with other
    projections makes the tests that use this fail, until what its groups own is said here.
    """
    if axis == "attention":
        query_heads = config.num_attention_heads // config.num_key_value_heads
        head_dim = head_dim_of(config)
        query = list(range(group * query_heads * head_dim, (group + 1) * query_heads * head_dim))
        key_value = list(range(group * head_dim, (group + 1) * head_dim))
        rows = {"self_attn.q_proj": query, "self_attn.k_proj": key_value, "self_attn.v_proj": key_value}
        columns = {"self_attn.o_proj": query}
        shared = {f"self_attn.{name}" for name in ("q_norm", "k_norm", "query_layernorm", "key_layernorm")}
        if hasattr(layer.self_attn, "qkv_proj"):
            groups = groups_of(layer, axis, config)
            first_key, first_value = groups * query_heads * head_dim, groups * (query_heads + 1) * head_dim
            keys, values = [first_key + i for i in key_value], [first_value + i for i in key_value]
            rows["self_attn.qkv_proj"] = query + keys + values
    else:
        rows = {"mlp.gate_proj": [group], "mlp.up_proj": [group]}
        columns = {"mlp.down_proj": [group]}
        shared = set()
        if hasattr(layer.mlp, "gate_up_proj"):
            rows["mlp.gate_up_proj"] = [group, groups_of(layer, axis, config) + group]
    block = "self_attn" if axis == "attention" else "mlp"
    for path, module in layer.named_modules():
        if path.startswith(block + ".") and any(True for _ in module.parameters(recurse=False)):
            if path in rows:
                yield f"{path}.weight", (rows[path], slice(None))
                if module.bias is not None:
                    yield f"{path}.bias", (rows[path],)
            elif path in columns:
                yield f"{path}.weight", (slice(None), columns[path])
            elif path not in shared:
                pytest.fail(
                    f"the tests do not know which weights of {path!r} a group owns: say so in weights_of_group in "
                    "tests/tiny_families.py"
                )
