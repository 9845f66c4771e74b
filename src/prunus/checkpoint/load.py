"""Reading a model folder, with every check that needs no weights made before the weights are read."""

from __future__ import annotations

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prunus.checkpoint.packaged_model import PACKAGED_MODEL, smollm2_135m
from prunus.errors import CheckpointError, NonFiniteError, OptionError, UnsupportedModelError
from prunus.files.json_file import read_json
from prunus.files.tensor_file import TensorFile
from prunus.machine.placement import resolve_device, resolve_dtype
from prunus.model.families import family_of

__all__ = ["check_finite", "check_folder", "load_model", "locate", "read_config"]

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")
#: what a model id of the Hub is fetched for: never a pickle
HUB_FILES = ["README.md", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "model*.safetensors"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
#: dtypes of safetensors whose weights can be cut
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def load_model(
    source: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Load a causal language model that prunus can cut, with its tokenizer.

    Nothing in the folder is executed: no pickle is opened and no code that travels with a model is run.

    Args:
        source: a model folder, the id of a model on the Hugging Face Hub, or `smollm2-135m`.
        dtype: `auto` keeps the checkpoint's dtype.
        device: where the weights go; `auto` is the first of cuda, mps, cpu.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        OptionError: unknown dtype or device.
        CheckpointError: no such folder or model, or it is incomplete or damaged.
        UnsupportedModelError: the family is not described, or the weights are quantised, GGUF or pickles.
        NonFiniteError: a weight is NaN or infinite.
    """
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    folder = locate(source)
    _, tokenizer = read_small_files(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # what a config with impossible values leads to: a division by zero, for one
        raise CheckpointError(f"the model in {folder} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for, first {missing[0]!r}; transformers "
            "would fill them with random numbers. Fetch the model again, or correct config.json"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning(
            "%s holds %d tensors that its model does not use, first %r", folder, len(unexpected), unexpected[0]
        )
    check_finite(model)
    return model.to(torch_device).eval(), tokenizer


def read_small_files(folder: Path) -> tuple[Any, Any]:
    """Check a model folder and read all of it but the weights: config and tokenizer.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
        UnsupportedModelError: see `check_folder`.
    """
    check_folder(folder)
    config = read_config(folder)
    try:
        return config, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's parser raises
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error


def read_config(folder: Path) -> Any:
    """The config of a model folder.

    Raises:
        CheckpointError: it describes no model, or cannot be read.
        UnsupportedModelError: see `check_config`.
    """
    check_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' validators raise several kinds
        raise CheckpointError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder of a model; a Hub id is fetched into the Hub's cache (weights as safetensors only).

    `smollm2-135m` is the packaged model, unpacked on first use.

    Raises:
        OptionError: `source` is empty.
        CheckpointError: no such folder, the Hub does not have it or cannot be reached, or the packaged model cannot be
            unpacked, see `smollm2_135m`.
        UnsupportedModelError: a GGUF file instead of a folder, or a Hub model that fails `check_config`.
    """
    name = os.fspath(source)
    if not name:
        raise OptionError(f"the model is an empty string. Give a folder, a hub id, or {PACKAGED_MODEL!r}.")
    if name == PACKAGED_MODEL:
        return smollm2_135m()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        raise UnsupportedModelError(_gguf_message(name))
    if path.exists():
        raise CheckpointError(
            f"{name!r} is a file, not a model folder. Give the folder that holds config.json and the safetensors."
        )
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"there is no model folder {name!r}. Check the path; a hub id looks like 'owner/name', and "
            f"{PACKAGED_MODEL!r} stands for the packaged SmolLM2-135M-Instruct."
        )
    try:
        # Small files first: most of what can be wrong shows in them, and weights may be many gigabytes.
        small = Path(snapshot_download(name, allow_patterns=["config.json"]))
        if (small / "config.json").is_file():
            check_config(small)
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a model that could be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the spelling and the network; a gated "
            "model needs `hf auth login`"
        ) from error


def check_folder(folder: Path) -> None:
    """Check that a model folder is complete and undamaged, reading only its config and the headers of its weights.

    Raises:
        CheckpointError: a file is missing, truncated or unreadable.
        UnsupportedModelError: the family is not described, or the weights are quantised, GGUF or pickles.
    """
    if not (folder / "config.json").is_file():
        if gguf := sorted(folder.glob("*.gguf")):
            raise UnsupportedModelError(_gguf_message(str(gguf[0])))
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
    layers = check_config(folder).get("num_hidden_layers")
    tensors = 0
    for shard, expected in shards_of(folder).items():
        file = TensorFile(shard)
        tensors += len(file.entries)
        if absent := sorted(expected - file.entries.keys()):
            raise CheckpointError(
                f"{shard} does not hold {absent[0]!r} ({len(absent)} tensors), which {INDEX} places there; "
                "fetch the model again"
            )
        for name, entry in file.entries.items():
            if entry["dtype"] not in FLOAT_DTYPES and name.rpartition(".")[0].endswith(("_proj", "lm_head")):
                raise UnsupportedModelError(
                    f"{shard}: {name!r} has dtype {entry['dtype']}, so the weights are quantised and cannot be cut; "
                    "use the bf16, fp16 or fp32 checkpoint"
                )
    if isinstance(layers, int) and layers > tensors:  # before a list of them is made, which could fill the memory
        raise CheckpointError(
            f"{folder / 'config.json'} describes {layers:,} decoder layers, but the weights are {tensors:,} tensors; "
            "fetch it again"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}, …); copy the base model's")


def check_config(folder: Path) -> dict[str, Any]:
    """Check config.json of a model folder: readable, of a described family, and not of a quantised model.

    Returns:
        Its content.

    Raises:
        CheckpointError: not valid JSON.
        UnsupportedModelError: unknown family, or quantised.
    """
    config = read_json(folder / "config.json")
    if quantization := config.get("quantization_config") or config.get("compression_config"):
        fields = quantization if isinstance(quantization, dict) else {}
        method = fields.get("quant_method") or fields.get("format") or "unknown method"
        raise UnsupportedModelError(
            f"the model in {folder} is already quantised ({method}); its packed weights cannot be cut. Prune the bf16, "
            "fp16 or fp32 checkpoint that it was made from, and quantise the result"
        )
    family_of(SimpleNamespace(**config))
    return config


def check_finite(model: Any) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        NonFiniteError: names the parameter and, if it is in one, the decoder layer.
    """
    for name, parameter in model.named_parameters():
        check_finite_tensor(name, parameter.detach())


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


def shards_of(folder: Path) -> dict[Path, set[str]]:
    """The weight files of a folder, with the tensors that the index places in each (none named: there is no index).

    Raises:
        CheckpointError: there are none, or one that the index lists is missing.
        UnsupportedModelError: the weights are pickles.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: set()}
    if not (folder / INDEX).is_file():
        if pickles := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise UnsupportedModelError(
                f"{folder} has its weights only as pickles ({pickles[0].name}), which can run any code when opened; "
                "prunus never does. Convert them to safetensors, or use a revision of the model that has them"
            )
        raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; fetch the model again")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; fetch the model again")
    shards: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(f"{folder / INDEX} places {name!r} in {file_name!r}, which is no file name")
        shards.setdefault(folder / file_name, set()).add(name)
    if absent := sorted(shard.name for shard in shards if not shard.is_file()):
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of the {len(shards)} weight files that {INDEX} lists, first {absent[0]}; "
            "fetch them again"
        )
    return shards
