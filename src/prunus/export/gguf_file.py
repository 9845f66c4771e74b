"""The GGUF file of a model: metadata, tokenizer and tensors, written so that it is either not there or complete."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunus.checkpoint import load_model, locate, read_config
from prunus.errors import CheckpointError, NonFiniteError, OptionError, UnsupportedModelError
from prunus.escaping import printable
from prunus.export.fill import fill_tensors, filled_parameters
from prunus.export.gguf_rope import Rope, rope_of
from prunus.export.gguf_source import GGUF_MARK, gguf_package
from prunus.export.gguf_tokenizer import gguf_tokenizer
from prunus.export.llama_cpp import Architecture, candidates, choose_architecture, widths_to_write
from prunus.export.memory import check_export_memory
from prunus.export.ollama import MODELFILE_MARK, modelfile
from prunus.files.outputs import check_disk, check_output_file, claimed, output_file
from prunus.files.user_path import expanded
from prunus.machine.bars import tracked
from prunus.model.geometry import Geometry, LayerWidths

__all__ = ["GGUF_TYPES", "GgufType", "export_gguf", "interleave"]

logger = logging.getLogger(__name__)

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
#: values per block of q8_0
_BLOCK = 32
#: of the largest tensor, the embeddings, while it is written: in float32, and what is made of that
_COPIES = 3


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


def export_gguf(
    source: str,
    out: str | Path,
    *,
    type: GgufType = "f16",
    mlp_multiple: int = 1,
    max_memory: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a model as a GGUF file for llama.cpp and what is built on it.

    A model whose layers differ in width becomes llama.cpp's `deci` (or `openelm`, with norms per head) where that has
    the family's arithmetic. All others become the stock architecture, filled up with zeros to equal layers. Norms and
    biases are float32 in every type.

    Args:
        source: folder or Hub id of a model, pruned or not.
        out: the file to write; complete or not there at all. A Modelfile for Ollama is written beside it.
        type: of the matrices: f32, f16, bf16 or q8_0 (blocks of 32 values with a scale).
        mlp_multiple: fill MLP widths up to multiples of this with channels of zeros; llama.cpp's K-quants need 256 to
            apply to every matrix. With q8_0 it is 32 at least.
        max_memory: memory that may be used, e.g. 8GB; None = as much as there is.
        overwrite: replace an existing file.
        progress: show a bar on a terminal.

    Returns:
        What was written: architecture, type, tensors, parameters (and how many of them are zeros that the model does
        not have), bytes, and the widths of every layer.

    Raises:
        OptionError: unknown type, or `out` is there already.
        UnsupportedModelError: llama.cpp has no architecture or tokenizer for the model; the message has the reason.
        CheckpointError: the package gguf is not installed, `source` cannot be read, or `out` cannot be written.
        NonFiniteError: a weight is too large for f16.
    """
    out = expanded(out)
    _check_options(type, mlp_multiple)
    with claimed(out, is_file=True, run=("gguf", source, type, mlp_multiple, overwrite)) as claim:
        if claim.finished:
            return dict(claim.facts)
        check_output_file(out, "model.gguf", GGUF_MARK, overwrite)
        # One that was written here goes with its GGUF file, and is no file of the user's.
        beside = out.with_suffix(".Modelfile")
        check_output_file(beside, "model.Modelfile", MODELFILE_MARK, overwrite=True)
        gguf = gguf_package()
        folder = locate(source)
        config = read_config(folder)
        candidates(config)  # before the weights are read
        check_export_memory(source, max_memory, _COPIES * 4 * config.vocab_size * config.hidden_size)
        model, tokenizer = load_model(folder, dtype=None)
        config = model.config
        geometry = Geometry.of(model)
        rope = rope_of(config, geometry.head_dim)
        ends = _end_tokens(model)
        vocabulary = gguf_tokenizer(tokenizer, config.vocab_size, ends)
        arch = candidates(config)[0].names
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], len(geometry.widths))
        architecture = choose_architecture(config, geometry, _biases(model, names), rope)
        if type == "q8_0":
            mlp_multiple = -(-mlp_multiple // _BLOCK) * _BLOCK
        widths = widths_to_write(architecture, geometry, mlp_multiple)
        zeros = filled_parameters(model, widths)
        check_disk(out, int((model.num_parameters() + zeros) * _bytes_per_weight(type)))
        try:
            with output_file(out, "model.gguf", GGUF_MARK, overwrite=overwrite) as partial:
                writer = gguf.GGUFWriter(partial, architecture.name)
                try:
                    _add_metadata(writer, gguf, config, geometry, architecture, widths, rope, type, Path(source).name)
                    vocabulary.write(writer)
                    with torch.no_grad():
                        written = _write_tensors(writer, gguf, model, names, architecture, widths, rope, type, progress)
                finally:
                    writer.close()
                with output_file(beside, "model.Modelfile", MODELFILE_MARK, overwrite=True) as text:
                    add_bos = vocabulary.special.add_special_token["bos"]
                    text.write_text(modelfile(out.name, tokenizer, ends, add_bos), encoding="utf-8")
                claim.facts = {
                    "architecture": architecture.name,
                    "type": type,
                    "bytes": partial.stat().st_size,
                    **written,
                    "of_them_zeros": zeros,
                    "head_count": [layer.num_key_value_heads * geometry.num_key_value_groups for layer in widths],
                    "head_count_kv": [layer.num_key_value_heads for layer in widths],
                    "feed_forward_length": [layer.intermediate_size for layer in widths],
                }
        except OSError as error:
            raise CheckpointError(f"could not write {out}: {error}") from error
    return dict(claim.facts)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection for a rotation of neighbouring pairs.

    transformers rotates value i of a head with value i + head_dim / 2, llama.cpp's Llama graph value 2i with 2i + 1.

    Args:
        rows: weight of shape (heads * head_dim, …) or bias of shape (heads * head_dim,).
        heads: number of heads.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _check_options(type: str, mlp_multiple: int) -> None:
    if type not in GGUF_TYPES:
        raise OptionError(f"`type` {type!r} is unknown; choose one of {', '.join(GGUF_TYPES)}")
    if mlp_multiple < 1:
        raise OptionError(f"`mlp_multiple` is {mlp_multiple}; it must be at least 1")


def _end_tokens(model: Any) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _entry_of(names: Any, name: str) -> tuple[str, str]:
    """Name and kind in GGUF of a tensor of the state dict."""
    module, _, parameter = name.rpartition(".")
    found = names.get_type_and_name(module)
    if found is None:
        raise UnsupportedModelError(f"GGUF has no name for {name!r}")
    return f"{found[1]}.{parameter}", found[0].name


def _biases(model: Any, names: Any) -> frozenset[str]:
    return frozenset(_entry_of(names, name)[1] for name in model.state_dict() if name.endswith(".bias"))


def _bytes_per_weight(type: str) -> float:
    return {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / _BLOCK}[type]


def _add_metadata(
    writer: Any,
    gguf: Any,
    config: Any,
    geometry: Geometry,
    architecture: Architecture,
    widths: Sequence[LayerWidths],
    rope: Rope,
    type: str,
    name: str,
) -> None:
    heads = [layer.num_key_value_heads * geometry.num_key_value_groups for layer in widths]
    key_value_heads = [layer.num_key_value_heads for layer in widths]
    channels = [layer.intermediate_size for layer in widths]
    one = not architecture.per_layer
    writer.add_type("model")
    writer.add_name(printable(name))
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[type]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(len(widths))
    writer.add_context_length(_context(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads[0] if one else heads)
    writer.add_head_count_kv(key_value_heads[0] if one else key_value_heads)
    writer.add_feed_forward_length(channels[0] if one else channels)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, field in architecture.fields.items():
        if (value := getattr(config, field)) is not None:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{architecture.name}.{key}", value)
    _add_kinds(writer, config, architecture)
    writer.add_rope_dimension_count(rope.dimensions)
    writer.add_rope_freq_base(rope.base)
    if rope.window_base is not None:
        writer.add_float32(f"{architecture.name}.rope.freq_base_swa", rope.window_base)
    if rope.long_factors is not None and rope.settings:
        writer.add_rope_scaling_orig_ctx_len(int(rope.settings["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(rope.settings["attention_factor"])
    if rope.scaling and rope.settings:
        writer.add_rope_scaling_type(getattr(gguf.RopeScalingType, rope.scaling.upper()))
        writer.add_rope_scaling_factor(rope.settings["factor"])
        if rope.scaling == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(rope.settings["original_max_position_embeddings"]))
            writer.add_rope_scaling_yarn_beta_fast(rope.settings["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope.settings["beta_slow"])


def _add_kinds(writer: Any, config: Any, architecture: Architecture) -> None:
    """Say for every layer of which kind it is, where llama.cpp would take it to be of another."""
    kinds = architecture.kinds
    if kinds is None or kinds.key is None:
        return
    found = kinds.of_model(config)
    if found != kinds.of_llama_cpp(len(found)):
        key = f"{architecture.name}.{kinds.key}"
        logger.warning(
            "which layers have %s is not what llama.cpp takes for granted, and is said in %s: a llama.cpp that is too "
            "old to read it (llama-cpp-python 0.3.36 is not) computes something else",
            kinds.what,
            key,
        )
        writer.add_array(key, found)


def _context(config: Any, architecture: Architecture) -> int:
    """Positions up to which the file computes what the model computes."""
    window = None if architecture.windows else getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        window = None
    if window is None or window >= config.max_position_embeddings:
        return int(config.max_position_embeddings)
    logger.warning(
        "the model's layers look back %d tokens, and llama.cpp's graph for it has no such window: the context length "
        "in the file is %d, up to which both compute the same",
        window,
        window,
    )
    return int(window)


def _write_tensors(
    writer: Any,
    gguf: Any,
    model: Any,
    names: Any,
    architecture: Architecture,
    widths: Sequence[LayerWidths],
    rope: Rope,
    type: GgufType,
    progress: bool,
) -> dict[str, int]:
    """Twice over the tensors: the head of the file names all of them, then each is converted and written alone."""

    def entries() -> Iterator[_Entry]:
        for name, factors in (
            ("rope_freqs", rope.factors),
            ("rope_factors_short", rope.short_factors),
            ("rope_factors_long", rope.long_factors),
        ):
            if factors is not None:
                yield _Entry(f"{name}.weight", name.upper(), factors)
        yield from _entries(model, names, architecture, widths)

    count, parameters = 0, 0
    for entry in entries():
        kind = _quantization(gguf, entry, type)
        shape = gguf.quant_shape_to_byte_shape(entry.tensor.shape, kind) if kind.name in ("BF16", "Q8_0") else None
        dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        shape = shape or tuple(entry.tensor.shape)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(entry.name, shape, np.dtype(dtype), nbytes, raw_dtype=kind)
        count, parameters = count + 1, parameters + entry.tensor.numel()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in tracked(entries(), "writing tensors", total=count, unit="tensor", progress=progress):
        kind = _quantization(gguf, entry, type)
        values = entry.tensor.to(device="cpu", dtype=torch.float32).contiguous().numpy()
        if kind.name == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise NonFiniteError(
                f"{entry.name} holds {np.abs(values).max():g}, beyond the largest number of f16; use `type` bf16"
            )
        writer.write_tensor_data(gguf.quants.quantize(values, kind))
    return {"tensors": count, "parameters": parameters}


def _entries(model: Any, names: Any, architecture: Architecture, widths: Sequence[LayerWidths]) -> Iterator[_Entry]:
    """The tensors of the file, in the order of the model's."""
    config, geometry = model.config, Geometry.of(model)
    head = geometry.family.head
    fused: list[_Entry] = []
    for source, tensor in fill_tensors(model, widths):
        if config.tie_word_embeddings and source.startswith(head + ".") and not architecture.own_head:
            continue  # llama.cpp takes the embeddings where there is no head
        name, kind = _entry_of(names, source)
        if kind.endswith("NORM"):
            tensor = tensor.float() + geometry.family.norm_offset
        if architecture.interleaved and kind in ("ATTN_Q", "ATTN_K"):
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


def _quantization(gguf: Any, entry: _Entry, type: GgufType) -> Any:
    types = gguf.GGMLQuantizationType
    if entry.tensor.ndim == 1:
        return types.F32
    if type == "q8_0" and entry.tensor.shape[-1] % _BLOCK:
        return types.F16  # a row has to be whole blocks
    return types[type.upper()]
