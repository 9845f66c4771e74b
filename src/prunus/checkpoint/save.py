"""Writing a model folder: weights, config, tokenizer, card and what prunus knows of it."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig

from prunus.checkpoint.architecture import config_as_weighted
from prunus.checkpoint.configuration_prunus import rope_fields_of_transformers_4
from prunus.checkpoint.conversion import Conversion, as_stored
from prunus.checkpoint.multimodal import copy_processor, empty_whole, tensors_around, whole_name
from prunus.checkpoint.stored_blocks import blocks_of
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.files.json_file import read_json, read_json_if_whole
from prunus.files.outputs import check_disk, output_folder, place_of
from prunus.files.tensor_file import TensorLayout, write_tensors
from prunus.machine.placement import dtype_name
from prunus.model.compact import kept
from prunus.model.families import FAMILIES, PRUNED_PREFIX, family_of
from prunus.model.layers import layers_of, outside_layers
from prunus.model.live import live_model
from prunus.model.saved_dtype import saved_dtype
from prunus.model.whole import Whole, whole_of

__all__ = ["check_whole", "model_bytes", "save_checkpoint"]

#: JSON fields in which a path on this machine would travel with the model
LOCAL_FIELDS = ("_name_or_path", "name_or_path", "_commit_hash", "tokenizer_file", "vocab_file", "merges_file")


def model_bytes(model: Any) -> int:
    """Bytes that the weights of a model take in a checkpoint, tied ones counted once."""
    itemsize = saved_dtype(model).itemsize
    if (blocks := blocks_of(model)) is not None:
        outside = sum(map(torch.Tensor.numel, outside_layers(model).values())) * itemsize
        return outside + sum(part.layout.bytes for part in blocks.slices(model).values())
    return sum(map(torch.Tensor.numel, model.parameters())) * itemsize


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

    Weights are safetensors in the dtype that the model will be saved in (see `prunus.model.saved_dtype`; as a rule its
    own), tied ones stored once. A model whose layers differ in width brings the files that define it, so that the
    folder loads without prunus (`trust_remote_code=True`).

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
    if (blocks := blocks_of(model)) is not None:
        layers = layers_of(model)
        if saved_dtype(model) != blocks.weights.held_in or layers.changed:
            what = "changed weights" if layers.changed else dtype_name(saved_dtype(model))
            raise UnsupportedModelError(
                f"the model's weights are stored in {blocks.title} and are saved as they are, so that {what} cannot be "
                "written; leave `save_dtype` and repair out, or cut the bf16 checkpoint"
            )
    try:
        with output_folder(out, overwrite=overwrite) as folder:
            whole = whole_of(model)
            around = whole.parameters * saved_dtype(model).itemsize if whole else 0
            check_disk(out, model_bytes(model) + around + sum(map(len, extras.values())))
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
    converted = saved_dtype(model) != model.dtype
    model.config = config_as_weighted(model)
    try:
        if (whole := whole_of(model)) is not None:
            _save_whole(folder, model, whole, max_shard_size)
        elif layers_of(model).stored or converted:
            # What is not weights; those follow, layer by layer.
            model.save_pretrained(folder, state_dict={})
            _stream_weights(folder, model, max_shard_size)
            path, changes = folder / "config.json", dict[str, Any]()
            if converted:
                changes["dtype"] = dtype_name(saved_dtype(model))
            if (blocks := blocks_of(model)) is not None:
                changes["quantization_config"] = blocks.weights.stored_config
            _write_json(path, {**read_json(path), **changes})
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        model.generation_config, model.config = generation_config, config
    generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    _keep_rope_readable(folder / "config.json")
    _keep_experts_readable(folder / "config.json")


def _save_whole(folder: Path, model: Any, whole: Whole, max_shard_size: int | str) -> None:
    """Write a multimodal model with this language model in it."""
    empty, around = _parts(model, whole)
    empty.save_pretrained(folder, state_dict={})
    _stream_weights(folder, model, max_shard_size, around, partial(whole_name, whole))
    copy_processor(whole, folder)


def check_whole(model: Any) -> None:
    """Check, before long work, that the multimodal model around a language model can be written, if there is one.

    Raises:
        CheckpointError: its tensors cannot be read, or are not those of its class.
    """
    if (whole := whole_of(model)) is not None:
        _parts(model, whole)


def _parts(model: Any, whole: Whole) -> tuple[Any, dict[str, Tensor]]:
    """The multimodal model around a language model, without weights, and the tensors that are not the latter's."""
    around = tensors_around(whole)
    empty = empty_whole(whole, model.config, saved_dtype(model))
    expected = {name for name in empty.state_dict() if name != "lm_head.weight" or not model.config.tie_word_embeddings}
    written = {*around, *(whole_name(whole, name) for name in _names(model))}
    if other := sorted(expected ^ written):
        raise CheckpointError(
            f"the {whole.kind.title} around the language model cannot be written: {len(other)} tensors would be "
            f"missing, or have no place in it, first {other[0]!r}. Save the language model alone (`output.text_only`)"
        )
    # In the dtype of the language model, should that be another one than the folder's.
    return empty, _converted(around, saved_dtype(model))


def _names(model: Any) -> list[str]:
    """Names of the tensors of a model that are stored, tied ones once."""
    prefix = family_of(model.config).layers + "."
    return [*outside_layers(model), *(name for name in model.state_dict() if name.startswith(prefix))]


def _stream_weights(
    folder: Path,
    model: Any,
    max_shard_size: int | str,
    around: Mapping[str, Tensor] = types.MappingProxyType({}),
    renamed: Callable[[str], str] = str,
) -> None:
    """Write the weights of a model as they are saved, with one decoder layer of an opened one in memory at a time.

    Args:
        folder: where.
        model: a language model.
        max_shard_size: largest weights file.
        around: tensors that are written with it, see `tensors_around`.
        renamed: the name of a tensor of the model in the files.
    """
    layers, prefix, dtype = layers_of(model), family_of(model.config).layers, saved_dtype(model)
    state_dict, blocks = model.state_dict(), blocks_of(model)
    slices = blocks.slices(model) if blocks else {}
    names = list(outside_layers(model)) if blocks else _names(model)
    empty = {name: state_dict[name].to("meta") for name in names}
    tensors = as_stored(model, _converted(empty, dtype))
    inner = {renamed(name): name for name in tensors}
    whole = {**around, **{name: tensors[inside] for name, inside in inner.items()}}
    for name, part in slices.items():
        whole[name] = torch.empty(part.layout.shape, dtype=part.layout.dtype, device="meta")
    split = split_torch_state_dict_into_shards(whole, max_shard_size=max_shard_size)
    conversion = Conversion(model, ())

    def read(wanted: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        outside = as_stored(model, {name: tensor.detach() for name, tensor in outside_layers(model).items()})
        held, state = -1, dict[str, Tensor]()
        for stored in wanted:
            name = inner.get(stored, stored)
            if stored in slices:
                yield stored, slices[stored].read()
                continue
            if stored in around:
                yield stored, around[stored]
                continue
            if name in outside:
                yield stored, _converted({name: outside[name]}, dtype)[name]
                continue
            number = name.removeprefix(prefix + ".").partition(".")[0]
            if int(number) != held:
                held = int(number)
                state.clear()  # the layer before, which must not be there beside the next
                with layers.hold(held, then=held + 1) as layer:
                    for inside, tensor in layer.state_dict().items():
                        state |= conversion.split(f"{prefix}.{held}.{inside}", tensor.detach())
            yield stored, _converted({name: state[name]}, dtype)[name]

    for file_name, wanted in split.filename_to_tensors.items():
        layouts = {name: TensorLayout.of(whole[name]) for name in wanted}
        write_tensors(folder / file_name, layouts, read(wanted), {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors with their numbers in a dtype; what are no floating-point numbers stays."""
    return {
        n: kept(tensor).detach().to(dtype) if tensor.is_floating_point() else tensor for n, tensor in tensors.items()
    }


def _keep_experts_readable(path: Path) -> None:
    """Write the number of experts also under the name that the family's own checkpoints have for it.

    transformers 5 maps some families' name to another one, and reads both; other readers know only the first.
    """
    config = read_json(path)
    family = FAMILIES.get(config["model_type"].removeprefix(PRUNED_PREFIX))
    mixture = family.mixture if family else None
    other = CONFIG_MAPPING[config["model_type"]].attribute_map.get(mixture.count) if mixture else None
    if mixture and other and other in config:
        _write_json(path, {**config, mixture.count: config[other]})


def _keep_rope_readable(path: Path) -> None:
    """Write the rotary frequencies also where transformers 4, and tools made for it, look for them.

    Those ignore `rope_parameters` and silently fall back to a default base; transformers 5 accepts both forms at once.
    """
    config = read_json(path)
    for part in (config, config.get("text_config")):
        if part:
            part |= rope_fields_of_transformers_4(part["model_type"], part.get("rope_parameters") or {})
    _write_json(path, config)


def _keep_readable_by_transformers_4(path: Path, tokenizer: Any) -> None:
    """Write the tokenizer's config as transformers 4 does, which 5 reads as well."""
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
