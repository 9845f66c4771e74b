"""What llama.cpp computes from a GGUF file, written down slowly, for files that only llama.cpp could load.

Follows the graphs `llama`, `qwen2`, `qwen3`, `deci` and `openelm` of llama.cpp (src/models), with their quirks: a layer
of deci without channels loses what its attention added, and the first layer's number of heads is read as the model's.
`make deploy-check` runs the real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu

INTERLEAVED = {"llama": True, "deci": True, "qwen2": False, "qwen3": False, "openelm": False}


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


def rotate(heads: Tensor, file: GgufFile) -> Tensor:
    """Rotary embedding; `heads` has shape (tokens, heads, head_dim)."""
    size = file["rope.dimension_count"]
    assert size == heads.shape[-1]
    frequencies = file["rope.freq_base"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if "rope_freqs.weight" in file.tensors:
        frequencies = frequencies / file.tensors["rope_freqs.weight"].double()
    if f"{file.architecture}.rope.scaling.type" in file.fields:
        assert file["rope.scaling.type"] == "linear"
        frequencies = frequencies / file["rope.scaling.factor"]
    angles = torch.arange(len(heads)).double()[:, None, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    if INTERLEAVED[file.architecture]:
        even, odd = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def attention(file: GgufFile, block: str, inputs: Tensor, heads: int, heads_kv: int) -> Tensor:
    size = file["attention.key_length"]
    if file.architecture == "openelm":
        parts = file.linear(f"{block}.attn_qkv", inputs).reshape(len(inputs), heads + 2 * heads_kv, size)
        query, key, value = parts.split([heads, heads_kv, heads_kv], dim=1)
    else:
        query, key, value = (
            file.linear(f"{block}.attn_{name}", inputs).reshape(len(inputs), count, size)
            for name, count in (("q", heads), ("k", heads_kv), ("v", heads_kv))
        )
    if file.architecture in ("qwen3", "openelm"):
        query, key = file.norm(f"{block}.attn_q_norm", query), file.norm(f"{block}.attn_k_norm", key)
    query, key = rotate(query, file), rotate(key, file)
    key, value = (tensor.repeat_interleave(heads // heads_kv, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / size**0.5
    scores = scores.masked_fill(torch.ones(len(inputs), len(inputs)).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return file.linear(f"{block}.attn_output", mixed.flatten(1))


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
    hidden = file.tensors["token_embd.weight"][tokens]
    for layer, (query_heads, key_value_heads, width) in enumerate(zip(heads, heads_kv, channels, strict=True)):
        block = f"blk.{layer}"
        after = hidden
        if query_heads:
            after = hidden + attention(
                file, block, file.norm(f"{block}.attn_norm", hidden), query_heads, key_value_heads
            )
        if not width:
            continue  # and `after` is lost
        inputs = file.norm(f"{block}.ffn_norm", after)
        gate, up = file.linear(f"{block}.ffn_gate", inputs), file.linear(f"{block}.ffn_up", inputs)
        hidden = after + file.linear(f"{block}.ffn_down", silu(gate) * up)
    hidden = file.norm("output_norm", hidden)
    return hidden @ file.tensors.get("output.weight", file.tensors["token_embd.weight"]).T
