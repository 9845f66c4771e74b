"""What kind of model a folder holds, by its small files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from prunus.checkpoint.multimodal import language_fields
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.files.json_file import read_json
from prunus.model.families import multimodal_of
from prunus.model.kind import check_architecture, check_attention, check_own_code

__all__ = ["ADAPTER", "check_kind", "check_no_sentence_model"]

#: what PEFT writes beside an adapter's weights
ADAPTER = "adapter_config.json"
#: what tells a sentence-transformers folder, whose modules stand behind the decoder
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]*_Pooling")


def check_kind(folder: Path, fields: Mapping[str, Any]) -> None:
    """Check that a folder holds a causal language model, of a class of transformers or prunus and of nothing else.

    Args:
        folder: the folder; of a model on the Hub it may hold no more than config.json.
        fields: the content of config.json, of a described family.

    Raises:
        CheckpointError: a field of config.json has another type than it should.
        UnsupportedModelError: classifier, encoder, text embedding model, or code of its own.
    """
    path, config = folder / "config.json", SimpleNamespace(**language_fields(fields))
    architectures, code = fields.get("architectures") or [], fields.get("auto_map") or {}
    if not isinstance(architectures, list) or not isinstance(code, dict):
        raise CheckpointError(f"{path}: architectures is {architectures!r} and auto_map {code!r}, no list and no table")
    check_own_code({name: code[name] for name in code if name != "AutoTokenizer"}, config, str(path))
    if (kind := multimodal_of(fields)) is not None:
        stock = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind.model_type]
        if other := [name for name in architectures if name not in (stock, f"Prunus{stock}")]:
            raise UnsupportedModelError(
                f"the model in {folder} is a {other[0]}; of model type {kind.model_type!r} prunus cuts the language "
                f"model in {stock}"
            )
    else:
        for name in architectures:
            check_architecture(config, str(name), f"the model in {folder}")
    check_attention(config, str(path))
    check_no_sentence_model(str(folder), (path.name for path in folder.iterdir()))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        code = read_json(tokenizer).get("auto_map") or {}
        check_own_code(code if isinstance(code, dict) else {"AutoTokenizer": code}, config, str(tokenizer))


def check_no_sentence_model(source: str, names: Iterable[str]) -> None:
    """Check that what lies in a folder or repository is no model of sentence-transformers.

    Raises:
        UnsupportedModelError: it is one.
    """
    for name in names:
        if any(fnmatch(name.partition("/")[0], pattern) for pattern in SENTENCE_FILES):
            raise UnsupportedModelError(
                f"{source} is a sentence-transformers model ({name}): the modules behind its decoder, such as pooling, "
                "would be lost, and it is not made to predict the next token. Prune the language model it was made from"
            )
