"""Models of the Hugging Face Hub: what a name means, and what a repository holds, before anything large is fetched."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from prunus.checkpoint.kind import ADAPTER, check_no_sentence_model
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.errors import CheckpointError, OptionError, UnsupportedModelError

__all__ = ["HUB_FILES", "at_revision", "check_repository", "hub_id"]

_HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9_][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
#: what a model id of the Hub is fetched for: never a pickle
HUB_FILES = ["README.md", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "model*.safetensors"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def hub_id(name: str) -> tuple[str, str | None] | None:
    """Repository and revision (None for the newest) that `owner/name` or `owner/name@revision` stands for.

    None if it can be neither.
    """
    match = _HUB_NAME.fullmatch(name)
    return (match["repository"], match["revision"]) if match else None


def at_revision(model: str, revision: str | None) -> str:
    """The name of a model at a revision of its repository: `owner/name@revision`.

    Raises:
        OptionError: the model is none of the Hub, or has a revision already.
    """
    if revision is None:
        return model
    name = hub_id(model)
    if Path(model).expanduser().exists() or model == PACKAGED_MODEL or name is None or name[1] is not None:
        raise OptionError(
            f"the revision {revision!r} goes with the id of a model on the Hub, owner/name; the model is {model!r}"
        )
    if hub_id(named := f"{model}@{revision}") is None:
        raise OptionError(f"{revision!r} is no revision; give a branch, a tag or a commit")
    return named


def check_repository(repository: str, revision: str | None) -> None:
    """Check that a repository holds a model that prunus reads, by the names of its files.

    Where the Hub cannot be asked nothing is checked: then the cache decides.

    Raises:
        CheckpointError: it has no such revision, or no weights or config of a model.
        UnsupportedModelError: it holds pickles, GGUF files or an adapter only, or a sentence-transformers model.
    """
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r}: give a branch, a tag or a commit") from error
    except Exception:  # no network, no such model, no permission: the download says which, or finds it in the cache
        return
    check_no_sentence_model(repository, files)
    if any(fnmatch(name, "model*.safetensors") for name in files):
        if "config.json" not in files:
            raise CheckpointError(f"{repository} has no config.json: it is no model of transformers")
        if ADAPTER in files:
            raise UnsupportedModelError(
                f"{repository} holds a PEFT adapter ({ADAPTER}) beside its weights, and transformers would add it to "
                "them. Merge it (merge_and_unload, save_pretrained), and prune that folder"
            )
        return

    def some(*patterns: str) -> str:
        found = [name for name in files if any(fnmatch(name, pattern) for pattern in patterns)]
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    if ADAPTER in files:
        raise UnsupportedModelError(
            f"{repository} holds an adapter only ({ADAPTER}): load it with its base model in PEFT, "
            "merge_and_unload, save_pretrained, and prune that folder"
        )
    if gguf := some("*.gguf"):
        raise UnsupportedModelError(
            f"{repository} holds GGUF files only ({gguf}), whose weights are packed for llama.cpp; name the repository "
            "with the original safetensors"
        )
    if pickles := some(*PICKLES):
        raise UnsupportedModelError(
            f"{repository} holds its weights only as pickles ({pickles}), which can run any code when opened; prunus "
            f"never does. A revision with safetensors may be among its pull requests: {repository}@refs/pr/1, for one"
        )
    if other := some("*.safetensors"):
        raise CheckpointError(
            f"{repository} holds safetensors ({other}), but none named model*.safetensors, as transformers reads them"
        )
    raise CheckpointError(f"{repository} holds no weights; it holds {some('*') or 'nothing'}")
