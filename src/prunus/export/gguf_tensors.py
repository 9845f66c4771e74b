"""The tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.errors import NonFiniteError
from prunus.export.fill import fill_tensors
from prunus.export.gguf_model import BLOCK, GgufModel, GgufType, entry_of
from prunus.machine.bars import tracked
from prunus.model.families import Family

__all__ = ["interleave", "write_tensors"]


#: small, and a rounded one would send tokens to other experts
_ROUTERS = ("FFN_GATE_INP", "FFN_GATE_INP_SHEXP")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        kind: name of gguf's MODEL_TENSOR, such as `ATTN_Q`.
        tensor: what is written, in the model's dtype.
    """

    name: str
    kind: str
    tensor: Tensor


def write_tensors(writer: Any, gguf: Any, described: GgufModel, progress: bool) -> dict[str, int]:
    """Write the head of a file, which names all tensors, and then each tensor, converted alone.

    Returns:
        How many tensors and parameters.

    Raises:
        NonFiniteError: a weight is too large for f16.
    """
    count, parameters = 0, 0
    for entry in _entries(described):
        kind = _quantization(gguf, entry, described.type)
        shape = gguf.quant_shape_to_byte_shape(entry.tensor.shape, kind) if kind.name in ("BF16", "Q8_0") else None
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        shape = shape or tuple(entry.tensor.shape)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(entry.name, shape, np.dtype(dtype), nbytes, raw_dtype=kind)
        count, parameters = count + 1, parameters + entry.tensor.numel()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in tracked(_entries(described), "writing tensors", total=count, unit="tensor", progress=progress):
        kind = _quantization(gguf, entry, described.type)
        values = entry.tensor.to(device="cpu", dtype=torch.float32).contiguous().numpy()
        if kind.name == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise NonFiniteError(
                f"{entry.name} holds {np.abs(values).max():g}, beyond the largest number of f16; use `type=bf16`"
            )
        writer.write_tensor_data(gguf.quants.quantize(values, kind))
    return {"tensors": count, "parameters": parameters}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection for a rotation of neighbouring pairs.

    transformers rotates value i of a head with value i + head_dim / 2, llama.cpp's Llama graph value 2i with 2i + 1.

    Args:
        rows: weight of shape (heads * head_dim, …) or bias of shape (heads * head_dim,).
        heads: number of heads.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _entries(described: GgufModel) -> Iterator[_Entry]:
    """The tensors of the file, in the order of the model's."""
    rope, architecture, geometry = described.rope, described.architecture, described.geometry
    for name, factors in (
        ("rope_freqs", rope.factors),
        ("rope_factors_short", rope.short_factors),
        ("rope_factors_long", rope.long_factors),
    ):
        if factors is not None:
            yield _Entry(f"{name}.weight", name.upper(), factors)
    tied = described.model.config.tie_word_embeddings
    head = geometry.family.head
    fused: list[_Entry] = []
    for source, tensor in _with_experts_apart(geometry.family, fill_tensors(described.model, described.widths)):
        if tied and source.startswith(head + ".") and not architecture.own_head:
            continue  # llama.cpp takes the embeddings where there is no head
        name, kind = entry_of(described.names, source)
        if kind.endswith("NORM"):
            tensor = tensor.float() + geometry.family.norm_offset
        if architecture.interleaved and not geometry.family.rotates_pairs and kind in ("ATTN_Q", "ATTN_K"):
            tensor = interleave(tensor, tensor.shape[0] // geometry.head_dim)
        if architecture.fused and kind in ("ATTN_Q", "ATTN_K", "ATTN_V"):
            fused.append(_Entry(name, kind, tensor))
            if len(fused) == 3:
                in_order = sorted(fused, key=lambda entry: ("ATTN_Q", "ATTN_K", "ATTN_V").index(entry.kind))
                fused_name = in_order[0].name.replace("attn_q.", "attn_qkv.")
                yield _Entry(fused_name, "ATTN_QKV", torch.cat([entry.tensor for entry in in_order]))
                fused = []
            continue
        yield _Entry(name, kind, tensor)


def _with_experts_apart(family: Family, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a mixture as GGUF has them, by names that gguf knows.

    There gate and up of the experts are apart, and the module of experts is always `mlp`, with the router `gate`.
    """
    block = next((block for block in family.all_blocks if block.experts), None)
    for source, tensor in tensors:
        layer, found, inside = source.partition(f".{block.module}.") if block else (source, "", "")
        if block is None or not found:
            yield source, tensor
            continue
        stem, path = f"{layer}.mlp", f"{block.module}.{inside}"
        if path == f"{block.experts}.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            yield f"{stem}.experts.gate_proj.weight", gate
            yield f"{stem}.experts.up_proj.weight", up
        elif path == f"{block.experts}.down_proj":
            yield f"{stem}.experts.down_proj.weight", tensor
        elif path == f"{block.router}.weight":
            yield f"{stem}.gate.weight", tensor
        elif path.endswith(".e_score_correction_bias"):
            yield f"{stem}.gate.e_score_correction.bias", tensor.flatten()
        else:
            yield source, tensor


def _quantization(gguf: Any, entry: _Entry, type: GgufType) -> Any:
    types = gguf.GGMLQuantizationType
    if entry.tensor.ndim == 1 or entry.kind in _ROUTERS:
        return types.F32
    if type == "q8_0" and entry.tensor.shape[-1] % BLOCK:
        return types.F16  # a row has to be whole blocks
    return types[type.upper()]
