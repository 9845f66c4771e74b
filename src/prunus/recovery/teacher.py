"""Which dense model a pruned one learns from, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from prunus.checkpoint.folder import check_folder
from prunus.checkpoint.hub import HUB_FILES, hub_id
from prunus.checkpoint.packaged_model import PACKAGED_MODEL, smollm2_135m
from prunus.errors import CheckpointError, OptionError
from prunus.files.json_file import check_content, read_json, read_json_if_whole
from prunus.results.result_content import MetricsContent

__all__ = ["bases_of", "check_vocabulary", "find_teacher"]

ADVICE = "name the dense model with `teacher`, or train without one: `kl_weight=0`"


def find_teacher(pruned: Path) -> tuple[Path, str]:
    """The model that a pruned folder was cut from, if it is on this machine: the first of all, where it was cut again.

    A folder is named without its place: it is looked for beside the pruned one, and in the current directory. A model
    of the Hub is taken from the Hub's cache.

    Args:
        pruned: folder of the pruned model.

    Returns:
        Its folder, and its name.

    Raises:
        CheckpointError: none is named, or it is not here.
    """
    bases = bases_of(pruned)
    found = next((found for name in bases if (found := _found(name, pruned)) is not None), None)
    if found is None:
        raise CheckpointError(
            f"{pruned} was cut from {bases[-1]!r}, which is neither beside it, nor in the current directory, nor in "
            f"the Hub's cache; {ADVICE}"
        )
    return found


def bases_of(pruned: Path) -> list[str]:
    """Names of the models that a pruned folder was cut from: the first of all, and the last where that is another.

    Raises:
        CheckpointError: none is named.
    """
    record = pruned / "prunus" / "metrics.json"
    try:
        facts = check_content(MetricsContent, read_json(record), str(record))
    except CheckpointError as error:
        raise CheckpointError(f"it is not known which model {pruned} was cut from ({error}); {ADVICE}") from error
    return [*([facts.original.model] if facts.original else []), facts.base_model]


def _found(name: str, pruned: Path) -> tuple[Path, str] | None:
    """A model that a pruned folder names, with its name; None where it is not on this machine."""
    if name == PACKAGED_MODEL:
        return smollm2_135m(), name
    for place in (pruned.resolve().parent / Path(name).name, Path(name)):
        # A pruned folder, this one or another, may have the name of the model that it was cut from.
        cut_from = (read_json_if_whole(place / "prunus" / "metrics.json") or {}).get("base_model")
        if (place / "config.json").is_file() and cut_from != name:
            return place, name
    try:
        repository, revision = hub_id(name) or (name, None)
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    check_folder(folder)  # one that is here and damaged is not one that is not here
    return folder, name


def check_vocabulary(config: Any, tokenizer: Any, teacher_config: Any, teacher_tokenizer: Any, teacher: str) -> None:
    """Check that two models speak of the same tokens: a distribution over others cannot be learned from.

    Raises:
        OptionError: sizes or tokens differ.
    """
    sizes = config.get_text_config().vocab_size, teacher_config.get_text_config().vocab_size
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"the teacher {teacher} has logits for {sizes[1]} tokens, the pruned model for {sizes[0]}: distillation "
            "needs the model it was cut from, or one with the same vocabulary"
        )
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise OptionError(
            f"the teacher {teacher} has another vocabulary than the pruned model: {len(differing)} tokens differ, "
            f"first {differing[0]!r} ({theirs.get(differing[0])} there, {ours.get(differing[0])} here)"
        )
