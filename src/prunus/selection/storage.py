"""How many bytes the weights of a model take, in a checkpoint's dtype or as llama.cpp quantises them.

In a checkpoint every parameter takes the bytes of its dtype. In a GGUF file vectors (norms, biases) are float32, and
matrices are stored in blocks along their rows, as `llama-quantize` does without an importance matrix:

    bytes of a matrix = rows · columns / values per block · bytes per block

- A mixture such as Q4_K_M gives the head, `attn_v`, `ffn_down` and others more bits, in some layers or in all.
- Rows that are no multiple of the block get another type: Q4_K becomes Q5_0, Q5_K Q5_1, Q6_K Q8_0, Q2_K and Q3_K
  IQ4_NL, and what does not fit into blocks of 32 F16.
- Qwen 3 with tied embeddings has queries, keys and values apart where its layers are equal, and fused where they are
  not: the form that takes more is counted.
- Channels are counted as filled up with zeros to the width that takes the fewest bytes, see `export`'s `mlp_multiple`.

What stands beside the weights is not counted: the header of a file, the tokenizer (of GGUF files 1 to 10 MB), padding.
Which layers get more bits is taken by their number in the dense model; where whole layers go, llama.cpp counts anew,
and the file differs by what one matrix more or less takes.

Source: llama.cpp, `llama_tensor_get_type` in src/llama-quant.cpp (September 2025); sizes of blocks: `GGML_QUANT_SIZES`
of the package gguf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prunus.errors import OptionError
from prunus.model.families import Axis, Projection
from prunus.model.geometry import Geometry
from prunus.selection.costs import Costs

__all__ = ["DTYPE_BYTES", "FILE_TYPES", "blocks_of", "check_storage", "storage_costs"]

#: dtypes of a checkpoint, and the bytes of a number
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
#: llama.cpp's types of a matrix: values per block, and bytes per block
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_1": (32, 20),
    "Q4_0": (32, 18),
    "IQ4_NL": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "Q3_K": (256, 110),
    "Q2_K": (256, 84),
}
#: what a type becomes where a row is no multiple of its block
FALLBACK: Mapping[str, str] = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL"}
#: llama.cpp's types of a file, and the type that most of its matrices have
FILE_TYPES: Mapping[str, str] = {
    **{name: name for name in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K")},
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
}

#: families whose files fuse queries, keys and values where embeddings are tied and layers differ, see export.llama_cpp
FUSED_WHERE_RAGGED = ("qwen3",)

#: matrices as llama.cpp tells them apart
Kind = Literal["embedding", "head", "query", "key", "value", "query_key_value", "attention_output", "gate_up", "down"]


@dataclass(frozen=True)
class _Matrix:
    """A matrix, or the part of a fused one that one kind of group owns.

    Attributes:
        kind: which one it is.
        rows: how many, of one group; 0 where groups are columns.
        columns: how many, of one group; 0 where groups are rows.
    """

    kind: Kind
    rows: int
    columns: int


def check_storage(name: str) -> str:
    """The name of a dtype or file type as it stands here, whatever its case.

    Raises:
        OptionError: there is no such type.
    """
    if name.lower() in DTYPE_BYTES:
        return name.lower()
    if name.upper() in FILE_TYPES:
        return name.upper()
    raise OptionError(f"type {name!r} is unknown; choose one of {', '.join((*DTYPE_BYTES, *FILE_TYPES))}")


def blocks_of(storage: str) -> int:
    """Values per block of most matrices: widths that are no multiple of it save nothing, or get another type."""
    return 1 if storage in DTYPE_BYTES else BLOCKS[FILE_TYPES[storage]][0]


def storage_costs(geometry: Geometry, storage: str) -> Costs:
    """Bytes of the weights.

    Args:
        geometry: shape of the model.
        storage: one of `DTYPE_BYTES` or `FILE_TYPES`.
    """
    layers = len(geometry.widths)
    axes = geometry.axes
    blocks = [{axis: _curve(geometry, storage, layer_idx, axis) for axis in axes} for layer_idx in range(layers)]
    group = [{axis: _price(geometry, storage, axis, curve[axis]) for axis in axes} for curve in blocks]
    return Costs(f"bytes of weights in {storage}", _fixed(geometry, storage), blocks, group)


def _price(geometry: Geometry, storage: str, axis: Axis, curve: np.ndarray) -> float:
    """What a group takes on average: as a multiple of its parameters exactly, where there are no blocks."""
    if storage in DTYPE_BYTES:
        return geometry.group_parameters[axis] * DTYPE_BYTES[storage]
    return curve[-1].item() / (len(curve) - 1) if len(curve) > 1 else 0.0


def _fixed(geometry: Geometry, storage: str) -> int:
    """Bytes of embeddings, head and final norm, which stay."""
    outside = _outside(geometry)
    if storage in DTYPE_BYTES:
        return outside * DTYPE_BYTES[storage]
    rows, columns, matrices = geometry.vocab_size, geometry.hidden_size, _matrices_outside(geometry)
    tied: tuple[Kind, ...] = ("head",)
    kinds = ("head", "embedding") if matrices == 2 else tied[:matrices]
    stored = sum(rows * int(_row_bytes(storage, kind, 0, geometry, np.array(columns))) for kind in kinds)
    return stored + 4 * (outside - matrices * rows * columns)


def _matrices_outside(geometry: Geometry) -> int:
    """Embeddings and head: one matrix if they are tied."""
    return _outside(geometry) // (geometry.vocab_size * geometry.hidden_size)


def _outside(geometry: Geometry) -> int:
    """Parameters outside the decoder layers."""
    nothing = [type(widths)(0, 0) for widths in geometry.widths]
    return geometry.parameters_left(nothing)


def _curve(geometry: Geometry, storage: str, layer_idx: int, axis: Axis) -> np.ndarray:
    """Bytes of a block with 0, 1, … all of its groups; never falling."""
    groups = np.arange(geometry.widths[layer_idx][axis] + 1)
    if storage in DTYPE_BYTES:
        there = groups * geometry.group_parameters[axis] + (groups > 0) * geometry.leaves_with_block(layer_idx, axis)
        return there * DTYPE_BYTES[storage]
    hidden = geometry.hidden_size
    if axis == "expert":
        raise OptionError(
            f"how many bytes the experts of a mixture take in {storage} is not known: give `fit.size` without a type, "
            "or a share of the experts (`experts`)"
        )
    vectors = geometry.group_parameters[axis] - geometry.group_weights(axis)
    total = 4 * (groups * vectors + (groups > 0) * geometry.leaves_with_block(layer_idx, axis))
    forms = []
    for fused in _forms(geometry):
        form = np.zeros_like(total)
        for matrix in _matrices(geometry, axis, fused):
            columns = groups * matrix.columns if matrix.columns else np.full_like(groups, hidden)
            rows = groups * matrix.rows if matrix.rows else np.full_like(groups, hidden)
            form += rows * _row_bytes(storage, matrix.kind, layer_idx, geometry, columns)
        forms.append(form)
    total += np.max(forms, axis=0)
    if axis == "mlp":
        # A narrower matrix can be filled up with zeros where a wider one takes fewer bytes.
        return np.minimum.accumulate(total[::-1])[::-1]
    if layer_idx == 0 and len(total) > 1:
        total[0] = total[1]  # llama.cpp reads the model's number of heads there, so that one group stays
    return np.maximum.accumulate(total)


def _forms(geometry: Geometry) -> tuple[bool, ...]:
    """Whether a file has queries, keys and values fused that the model has apart: both where the cut decides."""
    ragged = geometry.family.model_type in FUSED_WHERE_RAGGED and _matrices_outside(geometry) == 1
    return (False, True) if ragged else (False,)


def _matrices(geometry: Geometry, axis: Axis, fused: bool) -> Iterator[_Matrix]:
    """The matrices of a block, with queries, keys and values fused as in the model, or in any case."""
    key_value: list[Kind] = ["key", "value"]
    for projection in geometry.family.block(axis).projections:
        if projection.inputs != "residual":
            kind: Kind = "attention_output" if axis == "attention" else "down"
            yield _Matrix(kind, 0, geometry.unit(projection.inputs))
            continue
        for space in projection.outputs:
            if axis == "mlp":
                kind = "gate_up"
            elif fused or _is_fused(projection):
                kind = "query_key_value"
            else:
                kind = "query" if space == "query" else key_value.pop(0)
            yield _Matrix(kind, geometry.unit(space), 0)


def _is_fused(projection: Projection) -> bool:
    return len(projection.outputs) > 1


def _row_bytes(storage: str, kind: Kind, layer_idx: int, geometry: Geometry, columns: np.ndarray) -> np.ndarray:
    """Bytes of one row of a matrix, for each of several numbers of columns."""
    wanted = _type_of(storage, kind, layer_idx, geometry)
    result = np.zeros_like(columns)
    missing = np.ones_like(columns, dtype=bool)
    for name in (wanted, FALLBACK.get(wanted, "F16"), "F16"):
        values, size = BLOCKS[name]
        fits = missing & (columns % values == 0)
        result = np.where(fits, columns // values * size, result)
        missing &= ~fits
    return result


def _type_of(storage: str, kind: Kind, layer_idx: int, geometry: Geometry) -> str:
    """The type of a matrix whose rows are whole blocks of it."""
    usual = FILE_TYPES[storage]
    if kind == "head":
        return "Q6_K" if usual not in ("F32", "F16", "BF16", "Q8_0") else usual
    layers = len(geometry.widths)
    more = layer_idx < layers // 8 or layer_idx >= 7 * layers // 8 or (layer_idx - layers // 8) % 3 == 2
    many = geometry.num_key_value_groups >= 4
    raised: Mapping[tuple[str, Kind], str | bool] = {
        ("Q2_K", "value"): "Q4_K" if many else "Q3_K",
        ("Q2_K", "down"): "Q3_K",
        ("Q2_K", "attention_output"): "Q3_K",
        ("Q2_K_S", "value"): many and "Q4_K",
        ("Q2_K_S", "down"): layer_idx < layers // 8 and "Q4_K",
        ("Q3_K_M", "value"): "Q5_K" if layer_idx < 2 else "Q4_K",
        ("Q3_K_M", "down"): "Q5_K" if layer_idx < layers // 16 else "Q4_K",
        ("Q3_K_M", "attention_output"): "Q4_K",
        ("Q3_K_M", "query_key_value"): "Q4_K",
        ("Q3_K_L", "value"): "Q5_K",
        ("Q3_K_L", "down"): "Q5_K",
        ("Q3_K_L", "attention_output"): "Q5_K",
        ("Q3_K_L", "query_key_value"): "Q4_K",
        ("Q4_K_S", "value"): layer_idx < 4 and "Q5_K",
        ("Q4_K_S", "down"): layer_idx < layers // 8 and "Q5_K",
        ("Q4_K_M", "value"): more and "Q6_K",
        ("Q4_K_M", "down"): more and "Q6_K",
        ("Q4_K_M", "query_key_value"): "Q5_K",
        ("Q5_K_M", "value"): more and "Q6_K",
        ("Q5_K_M", "down"): more and "Q6_K",
        ("Q5_K_M", "query_key_value"): "Q6_K",
    }
    return str(raised.get((storage, kind)) or usual)
