"""Tiny mixtures whose weights are stored in MXFP4 or FP8 blocks, and what those stand for.

They are decoded number by number, from the definitions of the formats, without the package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_folder import byte_tokenizer
from tiny_mixtures import make_mixture

from prunus.checkpoint import save_checkpoint

ROWS, COLUMNS = 8, 16
CONFIGS = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [ROWS, COLUMNS]},
}
SHAPES = {
    "mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 32}),
    "fp8": ("qwen3_moe", {"hidden_size": 48, "mlp_only_layers": []}),
}
WEIGHTS = "model.safetensors"


def e2m1(bits: int) -> float:
    """A number of 4 bits: sign, two of exponent with bias 1, one of fraction."""
    sign, exponent, fraction = -1.0 if bits & 8 else 1.0, bits >> 1 & 3, bits & 1
    return sign * (fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2))


def e4m3(bits: int) -> float:
    """A number of 8 bits: sign, four of exponent with bias 7, three of fraction."""
    sign, exponent, fraction = -1.0 if bits & 128 else 1.0, bits >> 3 & 15, bits & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8))


def decoded_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(experts, columns, rows) from (experts, rows, blocks, 16) and (experts, rows, blocks)."""
    experts, rows, count, _ = blocks.shape
    out = torch.zeros(experts, 32 * count, rows)
    for expert in range(experts):
        for row in range(rows):
            for block in range(count):
                power = 2.0 ** (int(scales[expert, row, block]) - 127)
                for place, byte in enumerate(blocks[expert, row, block].tolist()):
                    out[expert, 32 * block + 2 * place, row] = power * e2m1(byte % 16)
                    out[expert, 32 * block + 2 * place + 1, row] = power * e2m1(byte // 16)
    return out


def decoded_fp8(bits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(rows, columns) from bytes of that shape."""
    out = torch.zeros(bits.shape)
    for row, line in enumerate(bits.tolist()):
        for column, byte in enumerate(line):
            out[row, column] = e4m3(byte) * float(scales[row // ROWS, column // COLUMNS])
    return out


def in_mxfp4(tensors: dict, generator: torch.Generator) -> dict:
    """All experts' projections replaced by random blocks; → their decoded values by the names of the weights."""
    values = {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(123, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        values[name] = decoded_mxfp4(blocks, scales)
    return values


def in_fp8(tensors: dict, generator: torch.Generator) -> dict:
    """All linear modules but router and head likewise."""
    values = {}
    for name in [n for n in tensors if "_proj.weight" in n]:
        rows, columns = tensors[name].shape
        bits = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
        bits[(bits & 127) >= 64] -= 64  # no larger than 2, and no NaN
        scales = torch.rand(-(-rows // ROWS), -(-columns // COLUMNS), generator=generator).bfloat16()
        tensors[name], tensors[f"{name}_scale_inv"] = bits.view(torch.float8_e4m3fn), scales
        values[name] = decoded_fp8(bits, scales)
    return values


def make_stored(kind: str, folder: Path, **more: Any) -> Path:
    """A folder of random blocks, and beside it, as `-dense`, the same weights decoded, in bfloat16."""
    model_type, fields = SHAPES[kind]
    fields = {"vocab_size": 260, "max_position_embeddings": 256, **fields, **more}
    model = make_mixture(model_type, **fields).to(torch.bfloat16)
    save_checkpoint(model, byte_tokenizer(), folder, card="", extras={})
    dense = shutil.copytree(folder, folder.with_name(f"{folder.name}-dense"))
    tensors = load_file(folder / WEIGHTS)
    values = {"mxfp4": in_mxfp4, "fp8": in_fp8}[kind](tensors, torch.Generator().manual_seed(3))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[kind]}))
    original = load_file(dense / WEIGHTS)
    assert values.keys() <= original.keys()
    save_file({**original, **{n: v.bfloat16() for n, v in values.items()}}, dense / WEIGHTS, {"format": "pt"})
    return folder
