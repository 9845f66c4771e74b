"""The language model of a multimodal folder: taken out to be worked on, and written back inside.

Taken out, it is a causal language model of a described family: its config is made of the folder's `text_config`, and
its tensors are read under the names they have there (`LanguageWeights`). Written back, everything else of the folder
(towers, projectors, processor files) is as it was.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from prunus.checkpoint.weights import StoredWeights
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.model.families import PRUNED_PREFIX, Multimodal, family_of, multimodal_of
from prunus.model.whole import Whole

__all__ = [
    "LanguageWeights",
    "copy_processor",
    "empty_whole",
    "language_config",
    "language_fields",
    "tensors_around",
    "whole_name",
]

#: files of a processor, beside those of the tokenizer
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
#: fields of a text config that only a config inside another has
_INNER_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "base_config_key")
#: fields of rotary positions in more than one dimension, which are plain ones for text
_ROPE_IN_SPACE = ("mrope_section", "mrope_interleaved")
#: fields that hold the number of layers of a part
DEPTHS = ("num_hidden_layers", "depth")


def language_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the content of a config.json, what is about the language model: all of it, or `text_config`.

    Raises:
        UnsupportedModelError: a multimodal model whose language model is of no described family.
    """
    kind = multimodal_of(values)
    if kind is None:
        return values
    text = values.get("text_config")
    text = dict(text) if isinstance(text, dict) else {}
    text.setdefault("model_type", kind.default_part)
    elsewhere = {"transformers_weights": values["transformers_weights"]} if "transformers_weights" in values else {}
    return {**text, **elsewhere, "model_type": _family_type(kind, str(text["model_type"]))}


def language_config(config: Any) -> Any:
    """The config of a multimodal model's language model, as a causal language model of its family.

    Args:
        config: of the whole.
    """
    kind = multimodal_of(config)
    if kind is None:
        return config
    text = config.text_config
    model_type = _family_type(kind, text.model_type)
    if model_type == text.model_type:
        own = copy.deepcopy(text)
    else:
        fields = {name: value for name, value in text.to_dict().items() if name not in _INNER_FIELDS}
        rope = fields.get("rope_parameters") or {}
        fields["rope_parameters"] = {name: value for name, value in rope.items() if name not in _ROPE_IN_SPACE}
        own = AutoConfig.for_model(model_type, **fields)
    own.tie_word_embeddings = bool(config.tie_word_embeddings)
    own.dtype = own.dtype if own.dtype is not None else config.dtype
    own._attn_implementation = config._attn_implementation
    return own


def whole_config(whole: Whole, language: Any) -> Any:
    """The config of the multimodal model around a language model that may have been cut.

    Args:
        whole: what the language model was taken out of.
        language: config of the language model.
    """
    ragged = language.model_type.startswith(PRUNED_PREFIX)
    fields, text = whole.config.to_dict(), whole.config.text_config
    part = text.model_type.removeprefix(PRUNED_PREFIX)
    changed = {name: value for name, value in language.to_dict().items() if name not in _INNER_FIELDS}
    if part != language.model_type.removeprefix(PRUNED_PREFIX):
        changed["rope_parameters"] = text.rope_parameters
    kept = {name: value for name, value in text.to_dict().items() if name not in (*_INNER_FIELDS, "layer_widths")}
    fields = {name: value for name, value in fields.items() if name not in _INNER_FIELDS}
    fields["text_config"] = {**kept, **changed, "model_type": (PRUNED_PREFIX if ragged else "") + part}
    fields["tie_word_embeddings"] = bool(language.tie_word_embeddings)
    return AutoConfig.for_model((PRUNED_PREFIX if ragged else "") + whole.kind.model_type, **fields)


def empty_whole(whole: Whole, language: Any, dtype: torch.dtype) -> Any:
    """The multimodal model around a language model, with all its parameters on the meta device.

    Args:
        whole: what the language model was taken out of.
        language: config of the language model.
        dtype: of the parameters.
    """
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            whole_config(whole, language), dtype=dtype, trust_remote_code=False
        )


def whole_name(whole: Whole, name: str) -> str:
    """The name that a tensor of the language model has in the whole."""
    inside = name.removeprefix("model.")
    return name if inside == name else f"{whole.kind.decoder}.{inside}"


def tensors_around(whole: Whole) -> dict[str, Tensor]:
    """All tensors of a multimodal folder but the language model's, by the names they have in the whole.

    transformers reads them, as it knows the names that tensors had in older folders; of the language model it sees no
    layers.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    stock = copy.deepcopy(whole.config)
    text = {name: value for name, value in stock.text_config.to_dict().items() if name not in _INNER_FIELDS}
    text |= {"num_hidden_layers": 0, **({"layer_types": []} if text.get("layer_types") else {})}
    text.pop("layer_widths", None)
    text["model_type"] = stock.text_config.model_type.removeprefix(PRUNED_PREFIX)
    fields = {name: value for name, value in stock.to_dict().items() if name not in _INNER_FIELDS}
    config = AutoConfig.for_model(whole.kind.model_type, **{**fields, "text_config": text})
    try:
        with _quiet():
            model = AutoModelForImageTextToText.from_pretrained(
                whole.folder, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
    except Exception as error:  # as of language models
        raise CheckpointError(f"the model in {whole.folder} cannot be loaded: {error}") from error
    inside = (f"{whole.kind.decoder}.", "lm_head.")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}


def copy_processor(whole: Whole, out: Path) -> None:
    """Copy what makes a model's input out of images, and the chat template, where the tokenizer brings none."""
    for name in PROCESSOR_FILES:
        if (whole.folder / name).is_file() and not (out / name).exists():
            shutil.copyfile(whole.folder / name, out / name)


class LanguageWeights(StoredWeights):
    """Of the weights of a multimodal folder those of the language model, by their names in a causal language model.

    Args:
        folder: of the model.
        values: the content of its config.json.

    Raises:
        CheckpointError: as of `StoredWeights`, or there is no language model to be found in them.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any]):
        super().__init__(folder)
        family = family_of(SimpleNamespace(**language_fields(values)))
        stored = list(self)
        # Where it lies in the file has changed with the versions of transformers; its embeddings tell.
        embedding = family.embedding.rpartition(".")[2] + ".weight"
        found = [name for name in stored if name == embedding or name.endswith(f".{embedding}")]
        if len(found) != 1:
            raise CheckpointError(
                f"{folder}: the weights hold {len(found)} tensors {embedding!r}, where the language model of a "
                "multimodal model has one; fetch the model again"
            )
        before, head = found[0].removesuffix(embedding), f"{family.head}.weight"
        decoder = family.layers.rpartition(".")[0]
        self._check_depths(values, len(stored))
        mine: dict[str, str] = {}
        for name in stored:
            if name.startswith(before):
                mine[f"{decoder}.{name.removeprefix(before)}"] = name
            elif name == head or name.endswith(f".{head}"):
                mine[head] = name
        self._around = sum(prod(self.shape(name)) for name in set(stored).difference(mine.values()))
        self._names = self._places = {name: self._places[in_file] for name, in_file in mine.items()}

    def _check_depths(self, values: Mapping[str, Any], tensors: int) -> None:
        # A tower of a billion layers would fill the memory even without weights.
        for part, fields in values.items():
            for name in DEPTHS if isinstance(fields, dict) else ():
                depth = fields.get(name, 0)
                if type(depth) is not int or not 0 <= depth <= tensors:
                    raise CheckpointError(
                        f"{self.folder / 'config.json'}: {part}.{name} is {depth!r:.60}, and the weights are "
                        f"{tensors:,} tensors; fetch the model again, or correct config.json"
                    )

    def taken_out_of(self, config: Any) -> Any:
        """Note the multimodal model that they are of, as `whole`, and answer the language model's config.

        Args:
            config: of the whole.
        """
        kind = multimodal_of(config)
        assert kind is not None
        self.whole = Whole(kind, config, self.folder, self._around)
        return language_config(config)


def _family_type(kind: Multimodal, part: str) -> str:
    """Model type of the language model: that of its family, ragged or not."""
    prefix = PRUNED_PREFIX if part.startswith(PRUNED_PREFIX) else ""
    if (model_type := kind.parts.get(part.removeprefix(PRUNED_PREFIX))) is None:
        raise UnsupportedModelError(
            f"the language model in this {kind.model_type} model is of type {part!r}, and prunus cuts "
            f"{', '.join(kind.parts)} there"
        )
    return prefix + model_type


@contextmanager
def _quiet() -> Iterator[None]:
    """No lists of unused tensors by transformers: the decoder layers are left out on purpose."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
