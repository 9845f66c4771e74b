"""The GGUF file of a model: metadata, tokenizer and tensors, written so that it is either not there or complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import load_model, locate, read_config
from prunus.errors import CheckpointError, OptionError
from prunus.export.fill import filled_parameters
from prunus.export.gguf_metadata import write_metadata
from prunus.export.gguf_model import GGUF_TYPES, GgufType, gguf_model
from prunus.export.gguf_source import GGUF_MARK, gguf_package
from prunus.export.gguf_tensors import write_tensors
from prunus.export.gguf_tokenizer import gguf_tokenizer
from prunus.export.llama_cpp import candidates, expert_channels
from prunus.export.memory import check_export_memory
from prunus.export.ollama import MODELFILE_MARK, modelfile
from prunus.files.outputs import check_disk, check_output_file, claimed, output_file
from prunus.files.user_path import expanded
from prunus.model.families import family_of

__all__ = ["export_gguf"]

#: of the largest tensor while it is written: in float32, and what is made of that
_COPIES = 3


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
        check_export_memory(source, max_memory, _COPIES * 4 * _largest_tensor(config))
        model, tokenizer = load_model(folder, dtype=None)
        ends = _end_tokens(model)
        vocabulary = gguf_tokenizer(tokenizer, config.vocab_size, ends)
        described = gguf_model(gguf, model, type, mlp_multiple)
        zeros = filled_parameters(model, described.widths)
        check_disk(out, int((model.num_parameters() + zeros) * described.bytes_per_weight))
        try:
            with output_file(out, "model.gguf", GGUF_MARK, overwrite=overwrite) as partial:
                writer = gguf.GGUFWriter(partial, described.architecture.name)
                try:
                    write_metadata(writer, gguf, described, Path(source).name)
                    vocabulary.write(writer)
                    with torch.no_grad():
                        written = write_tensors(writer, gguf, described, progress)
                finally:
                    writer.close()
                with output_file(beside, "model.Modelfile", MODELFILE_MARK, overwrite=True) as text:
                    add_bos = vocabulary.special.add_special_token["bos"]
                    text.write_text(modelfile(out.name, tokenizer, ends, add_bos), encoding="utf-8")
                claim.facts = {
                    "architecture": described.architecture.name,
                    "type": type,
                    "bytes": partial.stat().st_size,
                    **written,
                    "of_them_zeros": zeros,
                    "head_count": described.heads,
                    "head_count_kv": described.key_value_heads,
                    "feed_forward_length": described.channels,
                }
        except OSError as error:
            raise CheckpointError(f"could not write {out}: {error}") from error
    return dict(claim.facts)


def _check_options(type: str, mlp_multiple: int) -> None:
    if type not in GGUF_TYPES:
        raise OptionError(f"`type` {type!r} is unknown; choose one of {', '.join(GGUF_TYPES)}")
    if mlp_multiple < 1:
        raise OptionError(f"`mlp_multiple` is {mlp_multiple}; it must be at least 1")


def _largest_tensor(config: Any) -> int:
    """Values in the embeddings, or in the gates of all experts of a layer where those are more."""
    mixture = family_of(config).mixture
    experts = getattr(config, mixture.count) * expert_channels(config) if mixture else 0
    return int(max(config.vocab_size, experts) * config.hidden_size)


def _end_tokens(model: Any) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else ends if isinstance(ends, list) else [ends]
