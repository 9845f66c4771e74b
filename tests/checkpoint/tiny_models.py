"""Tiny random models of every family, and cutting done here by hand, apart from the package's own surgery."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from prunus.checkpoint import empty_model, pruned_config
from prunus.model.widths import LayerWidths

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HIDDEN, HEAD_DIM, INTERMEDIATE, VOCAB, LAYERS = 32, 8, 24, 259, 4


def dense_config(family: str, heads: tuple[int, int] = (4, 2), **fields: Any) -> Any:
    """A stock config; `heads` are query heads and key/value heads."""
    return AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "pad_token_id": 256,
            "bos_token_id": 257,
            "eos_token_id": 258,
            **({"sliding_window": None} if family == "mistral" else {}),
            **fields,
        },
    )


def dense_model(family: str, heads: tuple[int, int] = (4, 2), *, seed: int = 0, **fields: Any) -> Any:
    """A stock model whose blocks, positions and biases all matter to its logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(dense_config(family, heads, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.tie_weights()
    return model


@dataclass(frozen=True)
class Kept:
    """The key/value heads and the channels that one layer keeps."""

    heads: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def widths(self) -> LayerWidths:
        return LayerWidths(len(self.heads), len(self.channels))


def columns(kept: Kept, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices that the kept groups own: query rows, key/value rows, channels."""
    query = [h * groups * HEAD_DIM + i for h in kept.heads for i in range(groups * HEAD_DIM)]
    key_value = [h * HEAD_DIM + i for h in kept.heads for i in range(HEAD_DIM)]
    return torch.tensor(query, dtype=int), torch.tensor(key_value, dtype=int), torch.tensor(kept.channels, dtype=int)


def zeroed(model: Any, kept: Sequence[Kept]) -> Any:
    """The oracle: the stock model of full size in which the cut groups' outputs are multiplied by zero."""
    oracle = copy.deepcopy(model)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, keep in zip(oracle.model.layers, kept, strict=True):
        query, _, channels = columns(keep, groups)
        for projection, indices in ((layer.self_attn.o_proj, query), (layer.mlp.down_proj, channels)):
            mask = torch.zeros(projection.in_features)
            mask[indices] = 1
            projection.weight.data *= mask
    return oracle


def cut(model: Any, kept: Sequence[Kept]) -> Any:
    """A smaller model, by index selection on the state dict; layers that keep nothing disappear."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    survivors = [i for i, keep in enumerate(kept) if keep.heads or keep.channels]
    smaller = empty_model(pruned_config(model.config, [kept[i].widths for i in survivors], survivors), model.dtype)
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            weights[name] = tensor.clone()
            continue
        number, inside = name.removeprefix("model.layers.").split(".", 1)
        if int(number) not in survivors:
            continue
        keep = kept[int(number)]
        query, key_value, channels = columns(keep, groups)
        attention = inside.startswith(("self_attn", "input_layernorm"))
        if (attention and not keep.heads) or (not attention and not keep.channels):
            continue
        if "q_proj" in inside:
            tensor = tensor[query]
        elif "k_proj" in inside or "v_proj" in inside:
            tensor = tensor[key_value]
        elif "gate_proj" in inside or "up_proj" in inside:
            tensor = tensor[channels]
        elif "o_proj.weight" in inside:
            tensor = tensor[:, query]
        elif "down_proj.weight" in inside:
            tensor = tensor[:, channels]
        weights[f"model.layers.{survivors.index(int(number))}.{inside}"] = tensor.clone()
    smaller.load_state_dict(weights, assign=True)
    smaller.tie_weights()
    return smaller


ALL = tuple(range(INTERMEDIATE))
#: layer 0 without attention, one without MLP, one narrow, one whole: every case that needs the ragged class
RAGGED = (Kept((), (0, 5, 6, 9)), Kept((1,), ()), Kept((0,), tuple(range(3, 20))), Kept((0, 1), ALL))
