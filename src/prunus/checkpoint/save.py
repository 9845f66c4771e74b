"""Writing a model folder so that it is either not there or complete.

The folder is written under a temporary name beside its final one, flushed to the disk, and renamed at the end:

    out/                              what was there before, or nothing, until the last moment
    .out.partial-<host>-<pid>/        being written
    .out.replaced-<host>-<pid>/       with `overwrite`: the old folder, between the two renames and its deletion

A run that is killed leaves one of the hidden names behind; the next run that writes to the same place removes it, or
puts the old folder back if it was killed between the renames.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from prunus.checkpoint.architecture import config_as_weighted
from prunus.checkpoint.configuration_prunus import rope_fields_of_transformers_4
from prunus.errors import CheckpointError
from prunus.files.json_file import read_json, read_json_if_whole
from prunus.files.tensor_file import TensorLayout, write_tensors
from prunus.model.families import family_of
from prunus.model.layers import layers_of, outside_layers

__all__ = ["check_disk", "check_output", "model_bytes", "save_checkpoint"]

logger = logging.getLogger(__name__)

#: what a folder that may be replaced can hold; anything else in it is somebody's, and stops the run
OUTPUT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "*.md"),
    *(
        "vocab.txt",
        "merges.txt",
        "plan.json",
        "*.csv",
        "*.png",
        "*.svg",
        "report.html",
        "LICENSE*",
        "NOTICE*",
        ".gitattributes",
    ),
    *("prunus", "plans", "chat_templates", "additional_chat_templates", "__pycache__", ".cache", ".DS_Store"),
)
#: a folder without any of these is not an earlier output, whatever else it holds
OUTPUT_MARKERS = ("config.json", "plan.json", "groups.csv", "comparison.csv", "prunus")
#: JSON fields in which a path on this machine would travel with the model
LOCAL_FIELDS = ("_name_or_path", "name_or_path", "_commit_hash", "tokenizer_file", "vocab_file", "merges_file")
#: room for tokenizer, card and tables, added to the weights
REST_BYTES = 64 * 2**20


def check_output(
    out: str | os.PathLike[str], overwrite: bool = False, model: str | os.PathLike[str] | None = None
) -> None:
    """Refuse an output folder that could not be written, before any long work; tidy up after a killed run.

    Args:
        out: where a model folder will be written.
        overwrite: whether a folder that is there already may be replaced. Only one that holds nothing but the files of
            a model or of an earlier prunus run ever is.
        model: what the result is made from: a folder, which is never replaced, or the name of a model.

    Raises:
        CheckpointError: `out` is a file, is or holds the current or home directory or the model, is not empty, or
            cannot be created.
    """
    target = _target(out)
    remove_interrupted(target)
    if model is not None and (source := Path(model).expanduser()).exists():
        source = source.resolve()
        if target == source or target in source.parents:
            raise CheckpointError(f"output {out} is the folder of the model, or holds it; name another folder")
    for place, what in ((Path.cwd(), "the current directory"), (Path.home(), "your home directory")):
        if target == place.resolve() or target in place.resolve().parents:
            raise CheckpointError(f"output {out} is {what} or holds it; name a new folder inside it")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"output {out} is a file; name a folder that does not exist yet")
    entries = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if entries and not overwrite:
        raise CheckpointError(
            f"output folder {out} is not empty (it holds {_some(entries)}); choose another, or pass --overwrite "
            "(overwrite=True) to replace it"
        )
    if entries:
        foreign = [name for name in entries if not any(fnmatch.fnmatch(name, known) for known in OUTPUT_FILES)]
        if foreign or not any(name in OUTPUT_MARKERS for name in entries):
            raise CheckpointError(
                f"output folder {out} does not look like an earlier output: it holds {_some(foreign or entries)}. "
                "--overwrite replaces nothing but model folders; remove it yourself, or choose another"
            )
    parent = _existing_parent(target)
    if not parent.is_dir():
        raise CheckpointError(f"output folder {out} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"output folder {out} cannot be created: no permission to write in {parent}")


def check_disk(out: str | os.PathLike[str], expected_bytes: int) -> None:
    """Refuse an output folder on a disk without room for `expected_bytes`.

    Raises:
        CheckpointError: too little is free.
    """
    parent = _existing_parent(_target(out))
    free = shutil.disk_usage(parent).free
    if free < expected_bytes:
        raise CheckpointError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, the model folder needs about "
            f"{expected_bytes / 1e9:.2f} GB; free some space or choose another output folder"
        )


def model_bytes(model: Any) -> int:
    """Bytes that the weights of a model take in a checkpoint, tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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

    Weights are safetensors in the model's dtype, tied ones stored once. A model whose layers differ in width brings the
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
    """
    target = _target(out)
    check_output(out, overwrite)
    check_disk(out, model_bytes(model) + sum(map(len, extras.values())) + REST_BYTES)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(target, "partial")
    try:
        partial.mkdir()
        _write_files(partial, model, tokenizer, card, extras, max_shard_size)
        layers_of(model).verify()
        _flush(partial)
        _move_into_place(partial, target)
    except BaseException as error:
        # Ctrl-C too. Only kill -9 and power failure skip this, and then the next run tidies up.
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"could not write the model folder {out}: {error}") from error
        raise
    return target


def remove_interrupted(target: Path) -> None:
    """Remove what runs that were killed while writing `target` left behind; bring back a folder they had moved away."""
    if not target.parent.is_dir():
        return
    pattern = re.compile(
        rf"\.{re.escape(target.name)}\.(?P<state>partial|replaced)-{re.escape(platform.node())}-(?P<pid>\d+)"
    )
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match is None or not entry.is_dir() or _is_running(int(match["pid"])):
            continue
        if match["state"] == "replaced" and not target.exists():
            logger.warning("putting back %s: a run was killed while it replaced this folder", target)
            entry.rename(target)
        else:
            logger.warning("removing %s, left by a run that was killed", entry)
            shutil.rmtree(entry, ignore_errors=True)


def _target(out: str | os.PathLike[str]) -> Path:
    # Links are followed, so that the folder behind a link is replaced and not the link.
    try:
        target = Path(out).expanduser().resolve()
        target.exists()
        str(target).encode()
    except (OSError, RuntimeError, UnicodeError) as error:  # too long, links in a circle, nobody's home, not UTF-8
        raise CheckpointError(f"output {str(out)!r} cannot be created: {error}") from error
    return target


def _existing_parent(target: Path) -> Path:
    return next(parent for parent in target.parents if parent.exists())


def _sibling(target: Path, state: str) -> Path:
    return target.with_name(f".{target.name}.{state}-{platform.node()}-{os.getpid()}")


def _is_running(pid: int) -> bool:
    """Whether another process of this machine has this id."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True  # signal 0 is no mere question there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    stored = layers_of(model).stored
    model.config = config_as_weighted(model)
    try:
        # Of an opened model only what is not weights: those follow, layer by layer.
        model.save_pretrained(folder, max_shard_size=max_shard_size, **({"state_dict": {}} if stored else {}))
    finally:
        model.generation_config, model.config = generation_config, config
    if stored:
        _stream_weights(folder, model, max_shard_size)
    generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    _keep_rope_readable(folder / "config.json")


def _stream_weights(folder: Path, model: Any, max_shard_size: int | str) -> None:
    """Write the weights of an opened model with one decoder layer in memory at a time."""
    layers, prefix = layers_of(model), family_of(model.config).layers
    names = [*outside_layers(model), *(name for name in model.state_dict() if name.startswith(prefix + "."))]
    whole = model.state_dict()
    split = split_torch_state_dict_into_shards({name: whole[name] for name in names}, max_shard_size=max_shard_size)

    def read(wanted: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        outside = outside_layers(model)
        held, state = -1, {}
        for name in wanted:
            if name in outside:
                yield name, outside[name]
                continue
            number, _, inside = name.removeprefix(prefix + ".").partition(".")
            if int(number) != held:
                held = int(number)
                with layers.hold(held, then=held + 1) as layer:
                    state = dict(layer.state_dict())
            yield name, state[inside]

    for file_name, wanted in split.filename_to_tensors.items():
        layouts = {name: TensorLayout.of(whole[name]) for name in wanted}
        write_tensors(folder / file_name, layouts, read(wanted), {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


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


def _flush(folder: Path) -> None:
    """Have the disk hold every file before the rename can; give all files the mode of those written here."""
    mode = (folder / "README.md").stat().st_mode & 0o777  # safetensors writes files that only the owner can read
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
            _fsync(path)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _fsync(path)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not target.exists():
        partial.rename(target)
        _fsync(target.parent)
        return
    replaced = _sibling(target, "replaced")
    target.rename(replaced)
    try:
        partial.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    _fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
