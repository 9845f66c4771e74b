"""What llama.cpp computes from a GGUF file, written down slowly, for files that only llama.cpp could load.

Follows llama.cpp's graphs (src/models), with their quirks: a layer of deci without channels loses what its attention
added, the first layer's number of heads is read as the model's, and layers have kinds by their numbers. `make
deploy-check` runs the real one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

INTERLEAVED = (
    "llama",
    "deci",
    "granite",
    "smollm3",
    "ernie4_5",
    "glm4",
    "granitemoe",
    "ernie4_5-moe",
    "chatglm",
    "mistral3",
)
HEADS_SPAN_HIDDEN = ("qwen2", "olmo2", "exaone4", "phi3", "qwen2moe", "olmoe", "chatglm")
#: norms behind the blocks, and none in front of them
NORMS_AFTER = ("olmo2", "exaone4")
GEMMA = ("gemma", "gemma2", "gemma3")
#: a sliding window in all layers but every so-manieth
WINDOWS = {"gemma2": 2, "gemma3": 6, "olmo2": 4, "exaone4": 4}


class GgufFile:
    """Fields and tensors of a file; tensors are dequantised to float32."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {}
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            # the file has shapes the other way round
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self.tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
        self.architecture = self.fields["general.architecture"]

    def __getitem__(self, name: str) -> Any:
        """A field of the architecture's own."""
        return self.fields[f"{self.architecture}.{name}"]

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{name}", default)

    @property
    def has_windows(self) -> bool:
        if self.architecture == "exaone4":
            return self["block_count"] == 64
        return self.architecture in WINDOWS and self.get("attention.sliding_window") is not None

    def has_window(self, layer: int) -> bool:
        if not self.has_windows:
            return False
        period = WINDOWS[self.architecture]
        pattern = self.get("attention.sliding_window_pattern")
        return layer % period < period - 1 if pattern is None else pattern[layer]

    def per_layer(self, name: str) -> list[int]:
        value = self[name]
        return value if isinstance(value, list) else [value] * self["block_count"]

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        outputs = inputs @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return outputs if bias is None else outputs + bias

    def norm(self, name: str, inputs: Tensor) -> Tensor:
        scale = (inputs.square().mean(-1, keepdim=True) + self["attention.layer_norm_rms_epsilon"]).rsqrt()
        return inputs * scale * self.tensors[f"{name}.weight"]


def yarn_ramp(file: GgufFile, size: int, base: float) -> Tensor:
    """How far each frequency is stretched, from 0 to 1."""
    length = file["rope.scaling.original_context_length"]
    first, last = (
        size * math.log(length / (file[f"rope.scaling.yarn_beta_{end}"] * 2 * math.pi)) / (2 * math.log(base))
        for end in ("fast", "slow")
    )
    low, high = max(0, math.floor(first)), min(size - 1, math.ceil(last))
    return ((torch.arange(size // 2).double() - low) / max(0.001, high - low)).clamp(0, 1)


def rotate(heads: Tensor, file: GgufFile, layer: int) -> Tensor:
    """Rotary embedding; `heads` has shape (tokens, heads, head_dim)."""
    size = file["rope.dimension_count"]
    if file.architecture == "smollm3" and (layer + 1) % 4 == 0:
        return heads
    if file.architecture == "exaone4" and file.has_windows and not file.has_window(layer):
        return heads
    if size < heads.shape[-1]:
        assert file.architecture in ("phi3", "glm4", "glm4moe", "chatglm")
        heads, rest = heads.split([size, heads.shape[-1] - size], -1)
        return torch.cat([rotate(heads, file, layer), rest], -1)
    base = file.get("rope.freq_base_swa", file["rope.freq_base"]) if file.has_window(layer) else file["rope.freq_base"]
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    for name in ("rope_freqs.weight", "rope_factors_short.weight"):
        if name in file.tensors:
            frequencies = frequencies / file.tensors[name].double()
    scaling, factor = file.get("rope.scaling.type"), file.get("rope.scaling.attn_factor", 1.0)
    if file.has_window(layer):
        scaling, factor = None, 1.0
    if scaling is not None:
        stretched = frequencies / file["rope.scaling.factor"]
        if scaling == "yarn":
            kept = 1 - yarn_ramp(file, size, base)
            frequencies = kept * frequencies + (1 - kept) * stretched
            factor *= 1 + 0.1 * math.log(file["rope.scaling.factor"])
        else:
            assert scaling == "linear"
            frequencies = stretched
    angles = torch.arange(len(heads)).double()[:, None, None] * frequencies
    cos, sin = factor * angles.cos().float(), factor * angles.sin().float()
    if file.architecture in INTERLEAVED:
        even, odd = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def attention(file: GgufFile, layer: int, inputs: Tensor, heads: int, heads_kv: int) -> Tensor:
    block, size = f"blk.{layer}", file["attention.key_length"]
    if f"{block}.attn_qkv.weight" in file.tensors:
        parts = file.linear(f"{block}.attn_qkv", inputs).reshape(len(inputs), heads + 2 * heads_kv, size)
        query, key, value = parts.split([heads, heads_kv, heads_kv], dim=1)
    else:
        query, key, value = (
            file.linear(f"{block}.attn_{name}", inputs).reshape(len(inputs), count, size)
            for name, count in (("q", heads), ("k", heads_kv), ("v", heads_kv))
        )
    if file.architecture in ("olmo2", "olmoe"):  # over all heads at once
        query = file.norm(f"{block}.attn_q_norm", query.flatten(1)).reshape(query.shape)
        key = file.norm(f"{block}.attn_k_norm", key.flatten(1)).reshape(key.shape)
    elif file.architecture in ("qwen3", "openelm", "gemma3", "exaone4", "qwen3moe", "glm4moe"):
        query, key = file.norm(f"{block}.attn_q_norm", query), file.norm(f"{block}.attn_k_norm", key)
    query, key = rotate(query, file, layer), rotate(key, file, layer)
    if scale := file.get("attention.temperature_scale"):
        assert file.architecture == "mistral3"
        before = torch.arange(len(query)) // file["rope.scaling.original_context_length"]
        query = query * (1 + scale * (1 + before).log())[:, None, None]
    if file.architecture == "hunyuan-dense":  # behind the rotation
        query, key = file.norm(f"{block}.attn_q_norm", query), file.norm(f"{block}.attn_k_norm", key)
    key, value = (tensor.repeat_interleave(heads // heads_kv, dim=1) for tensor in (key, value))
    divisor = size
    if (file.architecture, file["block_count"]) in (("gemma2", 46), ("gemma3", 62)):
        divisor = file["embedding_length"] // heads
    scores = torch.einsum("qhd,khd->hqk", query, key) * file.get("attention.scale", divisor**-0.5)
    if cap := file.get("attn_logit_softcapping"):
        scores = torch.tanh(scores / cap) * cap
    hidden = torch.ones(len(inputs), len(inputs)).triu(1).bool()
    if file.has_window(layer):
        hidden |= torch.ones(len(inputs), len(inputs)).tril(-file["attention.sliding_window"]).bool()
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)
    return file.linear(f"{block}.attn_output", mixed.flatten(1))


def mlp(file: GgufFile, block: str, inputs: Tensor) -> Tensor:
    if file.architecture in ("phi3", "glm4", "chatglm"):
        gate, up = file.linear(f"{block}.ffn_up", inputs).chunk(2, -1)
    else:
        gate, up = file.linear(f"{block}.ffn_gate", inputs), file.linear(f"{block}.ffn_up", inputs)
    gate = gelu(gate, approximate="tanh") if file.architecture in GEMMA else silu(gate)
    return file.linear(f"{block}.ffn_down", gate * up)


def experts(file: GgufFile, block: str, inputs: Tensor) -> Tensor:
    """Routed experts, one token and one expert after the other, and shared ones."""
    chances = file.linear(f"{block}.ffn_gate_inp", inputs)
    chances = chances.sigmoid() if file.architecture == "glm4moe" else chances.softmax(-1)
    correction = file.tensors.get(f"{block}.exp_probs_b.bias", torch.zeros(file["expert_count"]))
    sums = file.architecture in ("llama", "qwen3moe", "granitemoe", "ernie4_5-moe") or file.get("expert_weights_norm")
    gate, up, down = (file.tensors[f"{block}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
    assert gate.shape[:2] == (file["expert_count"], file["expert_feed_forward_length"])
    rows = []
    for x, chance in zip(inputs, chances, strict=True):
        chosen = (chance + correction).topk(file["expert_used_count"]).indices.tolist()
        total = sum(chance[expert] for expert in chosen) if sums else 1.0
        row = torch.zeros_like(x)
        for expert in chosen:
            output = down[expert] @ (silu(gate[expert] @ x) * (up[expert] @ x))
            row += file.get("expert_weights_scale", 1.0) * chance[expert] / total * output
        rows.append(row)
    routed = torch.stack(rows)
    if f"{block}.ffn_up_shexp.weight" not in file.tensors:
        return routed
    if file.architecture == "glm4moe":
        width = file["expert_shared_count"] * file["expert_feed_forward_length"]
    else:
        width = file["expert_shared_feed_forward_length"]
    assert len(file.tensors[f"{block}.ffn_up_shexp.weight"]) == width
    names = (f"{block}.ffn_gate_shexp", f"{block}.ffn_up_shexp")
    gated, wide = (file.linear(name, inputs) for name in names)
    shared = file.linear(f"{block}.ffn_down_shexp", silu(gated) * wide)
    if file.architecture == "qwen2moe":
        shared = shared * file.linear(f"{block}.ffn_gate_inp_shexp", inputs).sigmoid()
    return routed + shared


def has_experts(file: GgufFile, layer: int) -> bool:
    first, step = file.get("leading_dense_block_count", 0), file.get("interleave_moe_layer_step", 1)
    return file.get("expert_count", 0) > 0 and layer >= first and (layer + 1) % step == 0


def logits_of(file: GgufFile, tokens: Tensor) -> Tensor:
    """Logits of one sequence, shape (tokens, vocabulary)."""
    heads, heads_kv = file.per_layer("attention.head_count"), file.per_layer("attention.head_count_kv")
    channels = file.per_layer("feed_forward_length")
    assert heads[0], "llama.cpp would take the model to have no attention at all"
    if file.architecture not in ("deci", "openelm"):
        assert len({*heads}) == len({*heads_kv}) == len({*channels}) == 1
    if file.architecture == "openelm":
        assert all(heads)
        assert all(channels)
        assert "output.weight" not in file.tensors
    if file.architecture in HEADS_SPAN_HIDDEN:
        assert heads[0] * file["attention.key_length"] == file["embedding_length"]
    if file.architecture == "olmoe":
        assert heads == heads_kv  # it gives the norm of the keys the size of the hidden states
    if file.architecture in ("gemma", "gemma2"):
        assert "output.weight" not in file.tensors
    if file.architecture in ("olmo2", "olmoe", "qwen2moe"):
        assert "output.weight" in file.tensors
    hidden = file.tensors["token_embd.weight"][tokens] * file.get("embedding_scale", 1.0)
    if file.architecture in GEMMA:
        hidden = hidden * file["embedding_length"] ** 0.5
    added = file.get("residual_scale", 1.0)
    # The norm in front of the MLP, by the name that it has in transformers.
    after_attention = file.architecture in ("seed_oss", "glm4moe")
    for layer, (query_heads, key_value_heads, width) in enumerate(zip(heads, heads_kv, channels, strict=True)):
        block = f"blk.{layer}"
        after = hidden
        if query_heads:
            inputs = hidden if file.architecture in NORMS_AFTER else file.norm(f"{block}.attn_norm", hidden)
            outputs = attention(file, layer, inputs, query_heads, key_value_heads)
            if f"{block}.post_attention_norm.weight" in file.tensors and not after_attention:
                outputs = file.norm(f"{block}.post_attention_norm", outputs)
            after = hidden + added * outputs
        if not width:
            continue  # and `after` is lost
        before = "post_attention_norm" if after_attention else "ffn_norm"
        inputs = after if file.architecture in NORMS_AFTER else file.norm(f"{block}.{before}", after)
        outputs = (experts if has_experts(file, layer) else mlp)(file, block, inputs)
        if f"{block}.post_ffw_norm.weight" in file.tensors:
            outputs = file.norm(f"{block}.post_ffw_norm", outputs)
        hidden = after + added * outputs
    hidden = file.norm("output_norm", hidden)
    scores = hidden @ file.tensors.get("output.weight", file.tensors["token_embd.weight"]).T
    scores = scores / file.get("logit_scale", 1.0)
    cap = file.get("final_logit_softcapping")
    return torch.tanh(scores / cap) * cap if cap else scores
