"""A model folder: where it is, and every check that needs no weights."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from prunus.checkpoint.agreement import check_no_adapter, check_numbers, check_tensors, has_own_head
from prunus.checkpoint.block_formats import DecodedWeights, block_format
from prunus.checkpoint.hub import HUB_FILES, check_repository, hub_id
from prunus.checkpoint.kind import check_kind
from prunus.checkpoint.multimodal import LanguageWeights, language_fields
from prunus.checkpoint.packaged_model import PACKAGED_MODEL, smollm2_135m
from prunus.checkpoint.weights import StoredWeights
from prunus.errors import CheckpointError, NonFiniteError, OptionError, UnsupportedModelError
from prunus.files.json_file import read_json
from prunus.files.links import check_inside, check_links
from prunus.files.user_path import expanded
from prunus.model.families import family_of, multimodal_of
from prunus.model.whole import Whole

__all__ = [
    "check_finite_tensor",
    "check_folder",
    "locate",
    "read_config",
    "read_small_files",
    "read_tokenizer",
    "whole_around",
]

logger = logging.getLogger(__name__)

#: sixty times what the largest vocabulary has
MOST_TOKENS = 2**24
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
#: ways to compute attention that are part of PyTorch
ATTENTIONS = ("eager", "sdpa")


def read_small_files(folder: Path) -> tuple[Any, Any]:
    """Check a model folder and read all of it but the weights: config and tokenizer.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
        UnsupportedModelError: see `check_folder`.
    """
    config, _ = check_folder(folder)
    return config, read_tokenizer(folder)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    _check_token_ids(folder / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Fields of another type than they should have show only when a text goes through.
        tokenizer.decode(tokenizer("One text.", add_special_tokens=False)["input_ids"], skip_special_tokens=True)
        tokenizer("One text.")
        # Half of a surrogate pair could not be saved again.
        json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode("utf-8")
        return tokenizer
    except Exception as error:  # whatever a tokenizer's parser raises
        # What transformers tries last is another format, and its advice would be to install a package for that.
        reason = "tokenizer.model is no SentencePiece model, or damaged" if "tiktoken" in str(error).lower() else error
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def _check_token_ids(path: Path) -> None:
    """Raise CheckpointError for a number of a token that no vocabulary reaches.

    The tokenizers library makes a table up to the largest one, and ends the process if there is no memory for it.
    """
    try:
        content = json.loads(path.read_bytes())
        vocabulary = content["model"]["vocab"]
        numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        numbers += [token["id"] for token in content["added_tokens"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # of another kind, or not whole: the library says so itself
    if beyond := [number for number in numbers if type(number) is int and not 0 <= number < MOST_TOKENS]:
        raise CheckpointError(
            f"{path} gives a token the number {beyond[0]}, and no vocabulary has more than {MOST_TOKENS:,}; fetch the "
            "file again"
        )


def read_config(folder: Path) -> Any:
    """The config of a model folder, compared with its weights, of which only headers are read.

    Where the two are at odds about the head, the config says what the weights say; it always has a dtype.

    Raises:
        CheckpointError: it describes no model, or another one than the weights are of, or cannot be read.
        UnsupportedModelError: see `check_config`, or the weights cannot be cut.
    """
    return _config_and_weights(folder)[0]


def whole_around(folder: Path) -> Whole | None:
    """The multimodal model in a folder, without its language model; None where there is a language model alone.

    Raises:
        CheckpointError, UnsupportedModelError: see `read_config`.
    """
    return _config_and_weights(folder)[1].whole


def _config_and_weights(folder: Path) -> tuple[Any, StoredWeights]:
    values = check_config(folder)
    weights: StoredWeights
    if block_format(values) is not None:
        weights = DecodedWeights(folder, values)
    else:
        weights = StoredWeights(folder) if multimodal_of(values) is None else LanguageWeights(folder, values)
    check_numbers(language_fields(values), weights)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if isinstance(weights, LanguageWeights):
            config = weights.taken_out_of(config)
        if isinstance(weights, DecodedWeights):
            del config.quantization_config  # what is computed with is decoded; saving brings it back
        # Others (FlashAttention, a kernel of the Hub) were there where the model was trained, and need not be here.
        if config._attn_implementation not in ATTENTIONS:
            config._attn_implementation = None
    except Exception as error:  # transformers' validators raise several kinds
        raise CheckpointError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error
    check_tensors(config, weights)
    if has_own_head(config, weights):
        config.tie_word_embeddings = False
    if config.dtype is None:
        config.dtype = weights.dtype
    return config, weights


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder of a model; a Hub id is fetched into the Hub's cache (weights as safetensors only).

    `owner/name@revision` is a model at a branch, tag or commit; `smollm2-135m` is the packaged model, unpacked on first
    use.

    Raises:
        OptionError: `source` is empty.
        CheckpointError: no such folder, the Hub does not have it or cannot be reached, or the packaged model cannot be
            unpacked, see `smollm2_135m`.
        UnsupportedModelError: a GGUF file instead of a folder, or a Hub model that fails `check_repository` or
            `check_config`.
    """
    name = os.fspath(source)
    if not name:
        raise OptionError(f"the model is an empty string. Give a folder, a hub id, or {PACKAGED_MODEL!r}.")
    if name == PACKAGED_MODEL:
        return smollm2_135m()
    path = expanded(name)
    if path.is_dir():
        check_links(path)
        return path
    if path.is_file() and path.suffix == ".gguf":
        raise UnsupportedModelError(_gguf_message(name))
    if path.exists():
        raise CheckpointError(
            f"{name!r} is a file, not a model folder. Give the folder that holds config.json and the safetensors."
        )
    if (on_hub := hub_id(name)) is None:
        raise CheckpointError(
            f"there is no model folder {name!r}. Check the path; a hub id looks like 'owner/name' or "
            f"'owner/name@revision', and {PACKAGED_MODEL!r} stands for the packaged SmolLM2-135M-Instruct."
        )
    repository, revision = on_hub
    check_repository(repository, revision)
    try:
        # Small files first: most of what can be wrong shows in them, and weights may be many gigabytes.
        small = Path(snapshot_download(repository, revision=revision, allow_patterns=["config.json"]))
        if (small / "config.json").is_file():
            check_config(small)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a model that could be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the spelling and the network; a gated "
            "model needs `hf auth login`"
        ) from error


def check_folder(folder: Path) -> tuple[Any, StoredWeights]:
    """Check that a model folder is complete and undamaged, reading only its config and the headers of its weights.

    Returns:
        The config, as `read_config` gives it, and the weights that it was compared with.

    Raises:
        CheckpointError: a file is missing, truncated or unreadable, or config and weights are of different models.
        UnsupportedModelError: the family is not described, or the weights are quantised, GGUF or pickles.
    """
    check_no_adapter(folder)
    if not (folder / "config.json").is_file():
        if gguf := sorted(folder.glob("*.gguf")):
            raise UnsupportedModelError(_gguf_message(str(gguf[0])))
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
    config_and_weights = _config_and_weights(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}, …); copy the base model's")
    return config_and_weights


def check_config(folder: Path) -> dict[str, Any]:
    """Check config.json of a model folder: readable, of a causal language model of a described family, not quantised.

    Returns:
        Its content.

    Raises:
        CheckpointError: not valid JSON.
        UnsupportedModelError: unknown family, another kind of model (see `check_kind`), or quantised.
    """
    check_no_adapter(folder)
    check_inside(folder, folder / "config.json")
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization and block_format(config) is None:
        fields = quantization if isinstance(quantization, dict) else {}
        method = fields.get("quant_method") or fields.get("format") or "unknown method"
        raise UnsupportedModelError(
            f"the model in {folder} is already quantised ({method}); its packed weights cannot be cut. Prune the bf16, "
            "fp16 or fp32 checkpoint that it was made from, and quantise the result"
        )
    family_of(SimpleNamespace(**language_fields(config)))
    check_kind(folder, config)
    return config


def check_finite_tensor(name: str, weight: Tensor) -> None:
    """The same for one tensor, which is passed over if it is on the meta device."""
    # Both ends are finite exactly if all values are, and no mask as large as the weight is needed.
    if weight.is_meta or weight.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(weight)):
        return
    layer = re.search(r"\.layers\.(\d+)\.", f".{name}")
    count = int((~weight.isfinite()).sum())
    raise NonFiniteError(
        f"{name}{f' (layer {layer[1]})' if layer else ''} holds {count} NaN or infinite values among "
        f"{weight.numel()}; the checkpoint is damaged, or overflowed when it was converted to {weight.dtype}"
    )


def _gguf_message(path: str) -> str:
    return (
        f"{path} is a GGUF file, whose weights are packed for llama.cpp. Use the original safetensors checkpoint, or "
        "convert it: AutoModelForCausalLM.from_pretrained(folder, gguf_file=…), then delete config.quantization_config "
        "and save_pretrained"
    )
