"""Writing a model folder: weights, config, tokenizer, card and what prunus knows of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from prunus.checkpoint.architecture import config_as_weighted
from prunus.checkpoint.configuration_prunus import rope_fields_of_transformers_4
from prunus.errors import CheckpointError
from prunus.files.json_file import read_json, read_json_if_whole
from prunus.files.outputs import check_disk, output_folder, place_of
from prunus.files.tensor_file import TensorLayout, write_tensors
from prunus.machine.placement import dtype_name
from prunus.model.families import family_of
from prunus.model.layers import layers_of, outside_layers
from prunus.model.live import live_model
from prunus.model.saved_dtype import saved_dtype

__all__ = ["model_bytes", "save_checkpoint"]

#: JSON fields in which a path on this machine would travel with the model
LOCAL_FIELDS = ("_name_or_path", "name_or_path", "_commit_hash", "tokenizer_file", "vocab_file", "merges_file")


def model_bytes(model: Any) -> int:
    """Bytes that the weights of a model take in a checkpoint, tied ones counted once."""
    return sum(map(torch.Tensor.numel, model.parameters())) * saved_dtype(model).itemsize


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    out: str | os.PathLike[str],
    *,
    card: str,
    extras: Mapping[str, str | bytes],
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write a complete model folder, or nothing.

    Weights are safetensors in the dtype that the model will be saved in (see `prunus.model.saved_dtype`; without a word
    on that, its own), tied ones stored once. A model whose layers differ in width brings the
    files that define it, so that the folder loads without prunus (`trust_remote_code=True`).

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, or None.
        out: the folder to write.
        card: text of README.md.
        extras: files for the subfolder `prunus/`, by file name.
        overwrite: replace `out` if it is an earlier output; it stays untouched until the new folder is complete.
        max_shard_size: largest weights file, as in transformers.

    Returns:
        The folder.

    Raises:
        CheckpointError: `out` may not be written (see `check_output`), the disk is too full, or writing failed.
        UnsupportedModelError: see `live_model`.
    """
    model = live_model(model)
    try:
        with output_folder(out, overwrite=overwrite) as folder:
            check_disk(out, model_bytes(model) + sum(map(len, extras.values())))
            _write_files(folder, model, tokenizer, card, extras, max_shard_size)
            layers_of(model).verify()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write the model folder {out}: {error}") from error
    return place_of(out)


def _write_files(
    folder: Path, model: Any, tokenizer: Any, card: str, extras: Mapping[str, str | bytes], max_shard_size: int | str
) -> None:
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "prunus").mkdir()
    for name, content in extras.items():
        if not name or Path(name).name != name:
            raise CheckpointError(f"{name!r} cannot be written into prunus/: it must be a plain file name")
        (folder / "prunus" / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    _save_model(folder, model, max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _keep_readable_by_transformers_4(folder / "tokenizer_config.json", tokenizer)
    for path in folder.glob("*.json"):
        _drop_local_fields(path)


def _save_model(folder: Path, model: Any, max_shard_size: int | str) -> None:
    generation_config, config = model.generation_config, model.config
    try:
        generation_config.validate(strict=True)
    except ValueError:
        # Published models have settings that transformers loads with a warning but refuses to save (a temperature
        # without do_sample). They are the base model's, and no reason to lose the work: written as they are.
        model.generation_config = GenerationConfig()
    streamed = layers_of(model).stored or saved_dtype(model) != model.dtype
    model.config = config_as_weighted(model)
    try:
        # Of a model that is opened or to be converted only what is not weights: those follow, layer by layer.
        model.save_pretrained(folder, max_shard_size=max_shard_size, **({"state_dict": {}} if streamed else {}))
    finally:
        model.generation_config, model.config = generation_config, config
    if streamed:
        _stream_weights(folder, model, max_shard_size)
    if saved_dtype(model) != model.dtype:
        config_file = folder / "config.json"
        _write_json(config_file, {**read_json(config_file), "dtype": dtype_name(saved_dtype(model))})
    generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    _keep_rope_readable(folder / "config.json")


def _stream_weights(folder: Path, model: Any, max_shard_size: int | str) -> None:
    """Write weights in the dtype that the model will be saved in; of an opened one, a layer is in memory at a time."""
    layers, prefix = layers_of(model), family_of(model.config).layers
    names = [*outside_layers(model), *(name for name in model.state_dict() if name.startswith(prefix + "."))]
    whole, dtype = model.state_dict(), saved_dtype(model)
    as_saved = {name: _converted(torch.empty_like(whole[name], device="meta"), dtype) for name in names}
    split = split_torch_state_dict_into_shards(as_saved, max_shard_size=max_shard_size)

    def read(wanted: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        outside = outside_layers(model)
        held, state = -1, {}
        for name in wanted:
            if name in outside:
                yield name, _converted(outside[name], dtype)
                continue
            number, _, inside = name.removeprefix(prefix + ".").partition(".")
            if int(number) != held:
                held = int(number)
                with layers.hold(held, then=held + 1) as layer:
                    state = dict(layer.state_dict())
            yield name, _converted(state[inside], dtype)

    for file_name, wanted in split.filename_to_tensors.items():
        layouts = {name: TensorLayout.of(as_saved[name]) for name in wanted}
        write_tensors(folder / file_name, layouts, read(wanted), {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _keep_rope_readable(path: Path) -> None:
    """Write the rotary frequencies also where transformers 4, and tools made for it, look for them.

    Those ignore `rope_parameters` and silently fall back to a default base; transformers 5 accepts both forms at once.
    """
    config = read_json(path)
    if fields := rope_fields_of_transformers_4(config["model_type"], config.get("rope_parameters") or {}):
        _write_json(path, {**config, **fields})


def _keep_readable_by_transformers_4(path: Path, tokenizer: Any) -> None:
    """Say in the words of transformers 4, which 5 understands as well, what only 5 would understand."""
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", list(tokenizer.model_input_names))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write_json(path, config)


def _drop_local_fields(path: Path) -> None:
    content = read_json_if_whole(path) or {}
    if not content.keys().isdisjoint(LOCAL_FIELDS):
        _write_json(path, {name: value for name, value in content.items() if name not in LOCAL_FIELDS})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
