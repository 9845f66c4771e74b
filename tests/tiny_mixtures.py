"""Tiny mixtures of experts of every family, and what they compute, token by token, written down apart from the package.

A new family with experts needs an entry in `MIXTURES`, and its rule of routing in `choose`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from tiny_families import BASE, GQA, MHA, TIED
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from prunus.model.families import FAMILIES

EXPERTS, CHOSEN, WIDTH = 6, 2, 16
ROPE = {"rope_type": "default", "rope_theta": 1e4}
FUSED = {"intermediate_size": WIDTH, "num_experts_per_tok": CHOSEN, "num_local_experts": EXPERTS}
APART = {"moe_intermediate_size": WIDTH, "num_experts_per_tok": CHOSEN, "num_experts": EXPERTS}

#: model type → variant → fields of its config; together they cover renormalised weights and layers without experts
MIXTURES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_moe": {
        "tied": {**GQA, **TIED, **APART},
        "renormalised-one-dense": {**GQA, **APART, "norm_topk_prob": True, "mlp_only_layers": [0]},
    },
    "olmoe": {"gqa": {**GQA, **APART, "intermediate_size": WIDTH, "head_dim": None}},
    "mixtral": {"gqa": {**GQA, **FUSED}},
    "qwen2_moe": {"mha": {**MHA, **APART, "head_dim": None, "hidden_size": 32, "shared_expert_intermediate_size": 12}},
    "granitemoe": {"gqa": {**GQA, **FUSED, "head_dim": None, "residual_multiplier": 0.4, "attention_multiplier": 0.3}},
    "gpt_oss": {"gqa": {**GQA, **FUSED, "sliding_window": 6, "rope_parameters": ROPE}},
    "glm4_moe": {
        "one-dense": {
            **GQA,
            **APART,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "num_mtp_layers": 0,
        }
    },
    "ernie4_5_moe": {
        "one-dense": {
            **GQA,
            "moe_intermediate_size": WIDTH,
            "moe_num_experts": EXPERTS,
            "moe_k": CHOSEN,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        }
    },
}
#: every family with experts; one without a tiny model is listed too, so that it fails
MIXED_CASES: list[tuple[str, str]] = [
    (model_type, variant)
    for model_type, family in FAMILIES.items()
    if family.mixture
    for variant in MIXTURES.get(model_type, {"missing": {}})
]


def mixture_config(model_type: str, variant: str | None = None, **fields: Any) -> Any:
    """The config of a variant, with some fields changed."""
    if model_type not in MIXTURES:
        pytest.fail(f"family {model_type!r} has no tiny model to be tested on: add an entry to MIXTURES")
    variant = variant or next(iter(MIXTURES[model_type]))
    fields = {**BASE, **MIXTURES[model_type][variant], **fields}
    if fields["head_dim"] is None:
        del fields["head_dim"]
    if model_type == "glm4_moe":
        del fields["num_experts"]
    return AutoConfig.for_model(model_type, **fields)


def make_mixture(model_type: str, variant: str | None = None, *, seed: int = 0, **fields: Any) -> Any:
    """A mixture of random weights in which every weight, norm, bias and correction matters."""
    config = mixture_config(model_type, variant, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "inv_freq" not in name:
                    tensor.normal_(mean=float("norm" in name), std=0.25)
    model.tie_weights()
    return model


@lru_cache(maxsize=16)
def shared_mixture(model_type: str, variant: str) -> Any:
    """The same model for many tests, which must leave it as it is."""
    return make_mixture(model_type, variant)


def layers_with_experts(model: Any) -> list[tuple[int, Any]]:
    """Number and module of the block of experts of every layer that has one."""
    found = []
    for layer_idx, layer in enumerate(model.model.layers):
        block = getattr(layer, "block_sparse_moe", None) or layer.mlp
        if hasattr(block, "experts"):
            found.append((layer_idx, block))
    return found


def router_of(block: Any) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


def choose(model: Any, block: Any, x: Tensor, kept: Sequence[int]) -> tuple[list[int], Tensor]:
    """Experts of one token among those that are kept, and their weights, by the rule of each family, spelt out.

    Args:
        x: (hidden_size,).
        kept: the experts that may be chosen.
    """
    router, config, family = router_of(block), model.config, model.config.model_type
    kept = torch.tensor(sorted(kept))
    bias = router.bias[kept] if family == "gpt_oss" else 0.0
    logits = router.weight[kept].float() @ x.float() + bias
    if family in ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral"):
        scores = torch.exp(logits - logits.max())
        scores = scores / scores.sum()
        places = scores.argsort(descending=True)[: config.num_experts_per_tok]
        weights = scores[places]
        if family == "mixtral" or config.norm_topk_prob:
            weights = weights / weights.sum()
    elif family in ("granitemoe", "gpt_oss"):
        places = logits.argsort(descending=True)[: config.num_experts_per_tok]
        weights = torch.exp(logits[places]) / torch.exp(logits[places]).sum()
    elif family == "glm4_moe":
        scores = 1 / (1 + torch.exp(-logits))
        places = (scores + router.e_score_correction_bias[kept]).argsort(descending=True)[: config.num_experts_per_tok]
        weights = scores[places] / scores[places].sum() * config.routed_scaling_factor
    elif family == "ernie4_5_moe":
        scores = torch.exp(logits) / torch.exp(logits).sum()
        correction = router.moe_statics.e_score_correction_bias[0, kept]
        places = (scores + correction).argsort(descending=True)[: config.moe_k]
        weights = scores[places] / scores[places].sum()
    else:
        pytest.fail(f"the tests do not know how {family} routes: say so in choose in tests/tiny_mixtures.py")
    return kept[places].tolist(), weights


def one_expert(model: Any, block: Any, expert: int, x: Tensor) -> Tensor:
    """Output of one expert for one token, (hidden_size,), before it is weighed."""
    experts = block.experts
    if model.config.model_type == "gpt_oss":
        gate_up = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = gate_up[0::2].clamp(max=7.0), gate_up[1::2].clamp(min=-7.0, max=7.0)
        hidden = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        return hidden @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    width = experts.down_proj.shape[2]
    gate, up = experts.gate_up_proj[expert, :width] @ x, experts.gate_up_proj[expert, width:] @ x
    return experts.down_proj[expert] @ (up * gate / (1 + torch.exp(-gate)))


def shared_experts(block: Any, x: Tensor) -> Tensor | float:
    """What the shared experts add for one token."""
    if hasattr(block, "shared_expert"):
        return torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    shared = getattr(block, "shared_experts", None)
    return shared(x) if shared is not None else 0.0


#: told of a token, an expert and its weight and output: layer, number of the token, expert, weight, output
Note = Callable[[int, int, int, Tensor, Tensor], None]


def token_by_token(
    model: Any,
    kept: dict[int, Sequence[int]] | None = None,
    note: Note | None = None,
    gates: dict[int, Tensor] | None = None,
) -> Any:
    """The same model, with experts that run one token and one expert at a time.

    Args:
        model: stays as it is.
        kept: layer → the experts that its router sees; of other layers all.
        note: told of every expert of every token.
        gates: layer → factors on what each expert adds, (experts,); of other layers 1.
    """
    oracle = copy.deepcopy(model)
    for layer_idx, block in layers_with_experts(oracle):
        seen = (kept or {}).get(layer_idx, range(EXPERTS))
        gate = (gates or {}).get(layer_idx, torch.ones(EXPERTS))

        def forward(
            hidden: Tensor, block: Any = block, layer_idx: int = layer_idx, seen: Any = seen, gate: Tensor = gate
        ) -> Any:
            rows = []
            for number, x in enumerate(hidden.flatten(0, -2)):
                total = shared_experts(block, x)
                for expert, weight in zip(*choose(oracle, block, x, seen), strict=True):
                    output = one_expert(oracle, block, expert, x)
                    if note is not None:
                        note(layer_idx, number, expert, weight, output)
                    total = total + gate[expert] * weight * output
                rows.append(total)
            answer = torch.stack(rows).view_as(hidden)
            return (answer, None) if oracle.config.model_type == "gpt_oss" else answer

        block.forward = forward
    return oracle
