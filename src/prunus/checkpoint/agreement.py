"""Whether a config.json and the weights beside it describe the same model.

Sizes come first, as plain numbers against the headers of the weight files, since a model of impossible sizes must not
be built even without weights: a list of 10⁹ layers fills the memory. Then the class itself says which tensors it has,
and in which shapes. Where the config and the weights disagree, the weights decide (`has_own_head`), or the folder is
refused, for every engine alike.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from prunus.checkpoint.architecture import empty_model
from prunus.checkpoint.conversion import Conversion
from prunus.checkpoint.kind import ADAPTER
from prunus.checkpoint.weights import StoredWeights
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.model.families import FAMILIES, PRUNED_PREFIX, family_of

__all__ = ["check_no_adapter", "check_numbers", "check_tensors", "has_own_head", "unused_tensors", "warn_of_unused"]

logger = logging.getLogger(__name__)

#: dtypes of safetensors whose weights can be cut, and those that a model can be held in
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
HELD_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: config fields that are dimensions of tensors, or divide one
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
#: those of mixtures of experts, beside the number of experts
EXPERT_SIZES = ("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok", "moe_k")
#: other config fields that count something
COUNTS = ("max_position_embeddings", "sliding_window")
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
#: other numbers that make no sense at 0 or below, and why; where a model does without one, it is null
POSITIVE = {
    "attn_logit_softcapping": "scores are divided by it",
    "final_logit_softcapping": "logits are divided by it",
    "logits_scaling": "logits are divided by it",
    "query_pre_attn_scalar": "queries are divided by its root",
    "rope_theta": "rotary frequencies are powers of it",
    "rope_local_base_freq": "rotary frequencies are powers of it",
    "factor": "rotary frequencies are divided by it",
    "long_factor": "rotary frequencies are divided by it",
    "short_factor": "rotary frequencies are divided by it",
}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")
#: the buffer that every decoder layer of old checkpoints has; transformers passes over it, too
_OLD_BUFFERS = r"rotary_emb\.inv_freq"


def check_no_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter in it: transformers would add it to the weights, and no other reader would.

    Raises:
        UnsupportedModelError: there is one.
    """
    if (folder / ADAPTER).exists():
        raise UnsupportedModelError(
            f"{folder} holds a PEFT adapter ({ADAPTER}), which changes the model that it lies beside. Merge it first: "
            f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(…), and "
            f"save the tokenizer there, too; or move {ADAPTER} away to work on the base model without it"
        )


def check_numbers(values: Mapping[str, Any], weights: StoredWeights) -> None:
    """Check the numbers in a config.json, above all its sizes against the tensors that there are, before it is used.

    Args:
        values: the content of config.json.
        weights: of the same folder.

    Raises:
        CheckpointError: a size is no whole number from 1 on, or larger than any tensor; another number of layers; a
            number that is none (NaN, infinity), or beyond 64 bits.
        UnsupportedModelError: the config names a weights file of its own.
    """
    path = weights.folder / "config.json"
    ragged = str(values.get("model_type")).startswith(PRUNED_PREFIX)
    by_layer = values.get("layer_widths")
    if by_layer is not None and not ragged:
        raise CheckpointError(
            f"{path} has layer_widths, which model type {values.get('model_type')!r} does not know: its layers would "
            "be built in the stock widths. Remove the field, or fetch the config again"
        )
    if other := values.get("transformers_weights"):
        raise UnsupportedModelError(
            f"{path} has its weights read from {other!r} (transformers_weights); prunus reads model.safetensors or its "
            "index. Rename the file, and remove the field"
        )
    _check_every_number(path, values)
    largest = max((max(weights.shape(name), default=0) for name in weights if _has_bytes(weights, name)), default=0)
    family = FAMILIES.get(str(values.get("model_type")).removeprefix(PRUNED_PREFIX))
    experts = (*EXPERT_SIZES, family.mixture.count) if family and family.mixture else ()
    for name in (*SIZES, *COUNTS, *experts, "num_hidden_layers"):
        if values.get(name) is not None:
            # Of layers that differ, the fields of the same names describe the dense model; a mixture may have no layer
            # that is as wide as those without experts would be.
            unbounded = (by_layer is not None and name in WIDTHS) or (experts and name == "intermediate_size")
            bounded = name in (*SIZES, *experts) and not unbounded
            # A window that is not in use is 0 in configs that transformers has written.
            least = 0 if name == "sliding_window" and values.get("use_sliding_window") is False else 1
            _check_size(path, name, values[name], least, largest if bounded else None)
    layers = len({match[1] for name in weights if (match := _LAYER.match(name))})
    said = values.get("num_hidden_layers")
    # That a list of widths has as many entries is for the config's class to check; it has to be built for that.
    described = len(by_layer) if isinstance(by_layer, list) else said
    # Layers behind those, which predict further tokens (GLM-4.5), are no part of the model that transformers builds.
    further = values.get("num_nextn_predict_layers")
    matching = (described, (described or 0) + further if type(further) is int else None)
    # Under names of another kind, which are left to transformers, every layer still has a tensor at least.
    if (said or 0) > len(weights) or (layers and described is not None and layers not in matching):
        raise CheckpointError(
            f"{path} describes {said or described:,} decoder layers, and the weights are {len(weights):,} tensors in "
            f"{layers:,} layers; fetch the model again, or correct num_hidden_layers"
        )
    if by_layer is not None:
        if not isinstance(by_layer, list):
            raise CheckpointError(f"{path}: layer_widths is {by_layer!r:.60}, not a list with one entry per layer")
        for layer_idx, widths in enumerate(by_layer):
            if not isinstance(widths, dict):
                raise CheckpointError(f"{path}: layer_widths[{layer_idx}] is {widths!r:.60}, not three widths")
            for name in WIDTHS:
                _check_size(path, f"layer_widths[{layer_idx}].{name}", widths.get(name), 0, largest)


def check_tensors(config: Any, weights: StoredWeights) -> None:
    """Check names, shapes and dtypes of the tensors that a model of this config would read.

    Args:
        config: of the folder, its numbers checked.
        weights: of the same folder.

    Raises:
        CheckpointError: a tensor has another shape than the config says; one that is there would change the model, and
            the config switches it off; the config's dtype is none that weights can have.
        UnsupportedModelError: a tensor has a dtype that cannot be cut.
    """
    path = weights.folder / "config.json"
    if config.dtype is not None and config.dtype not in HELD_DTYPES:
        raise CheckpointError(f"{path}: dtype is {config.dtype}; a model is held in bfloat16, float16 or float32")
    try:
        DynamicCache(config=config)
    except Exception as error:  # kinds of attention that are not known, windows that are asked for and not there
        raise CheckpointError(
            f"{path} describes no model that can be run: {type(error).__name__} {error}; fetch it again, or correct "
            "layer_types and sliding_window"
        ) from error
    model = empty_model(copy.deepcopy(config), torch.float32)  # building notes dtype and attention in the config
    for name, parts in Conversion(model, weights).stored.items():
        found = {part: stored for part in parts if (stored := _stored_as(part, model, weights)) in weights}
        if found and (missing := [part for part in parts if part not in found]):
            raise CheckpointError(
                f"{weights.folder} lacks {len(missing)} of the {len(parts)} tensors that {name!r} is made of, first "
                f"{missing[0]!r}; fetch the model again, or correct the number of experts in config.json"
            )
        for part, stored in found.items():  # where there are none, for the engines to refuse: there are older names
            tensor = parts[part]
            _check_float(stored, weights)
            if weights.shape(stored) != tuple(tensor.shape):
                raise CheckpointError(
                    f"{weights.path(stored)}: {stored!r} has shape {weights.shape(stored)}, config.json makes it "
                    f"{tuple(tensor.shape)}, so that the model cannot be loaded; fetch the model again, or correct "
                    "config.json"
                )
    unused = unused_tensors(model, weights)
    for name in unused:
        if _LAYER.match(name):
            _check_float(name, weights)
    modules = {path for path, _ in model.named_modules()}
    for name in unused:
        module = name.rpartition(".")[0]
        if {module, f"{model.base_model_prefix}.{module}"} & modules or _in_layer(module) in _described():
            raise CheckpointError(
                f"{weights.path(name)} holds {name!r}, which the model that {path} describes does not have "
                f"({len(unused)} such tensors): the weights are of another model. Correct config.json (model_type, "
                "attention_bias, mlp_bias), or fetch the model again"
            )


def unused_tensors(model: Any, weights: Collection[str]) -> list[str]:
    """Names among those of the weights that a model has no place for, without the buffers that transformers ignores.

    Args:
        model: a causal language model, which may be without weights.
        weights: names of tensors.
    """
    parts = (part for parts in Conversion(model, weights).stored.values() for part in parts)
    expected = {_stored_as(part, model, weights) for part in parts}
    ignored = re.compile("|".join([_OLD_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())]))
    return sorted(name for name in weights if name not in expected and not ignored.search(name))


def warn_of_unused(folder: Path, unused: Iterable[str]) -> None:
    """Name the tensors of a folder that its model does not use."""
    if names := sorted(unused):
        first = ", ".join(repr(name) for name in names[:3])
        logger.warning("%s holds %d tensors that its model does not use: %s", folder, len(names), first)


def has_own_head(config: Any, weights: StoredWeights) -> bool:
    """Whether a model whose config ties the head to the embeddings has a head of its own in its weights.

    Fine-tuning may untie them without a word in the config. As in transformers, the weights decide.
    """
    family = family_of(config)
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if not config.tie_word_embeddings or head not in weights or embedding not in weights:
        return False
    return weights.shape(head) != weights.shape(embedding) or not weights.same_values(head, embedding)


def _check_float(name: str, weights: StoredWeights) -> None:
    if (dtype := weights.stored_dtype(name)) not in FLOAT_DTYPES:
        raise UnsupportedModelError(
            f"{weights.path(name)}: {name!r} has dtype {dtype}, so the weights are quantised and cannot be cut; use "
            "the bf16, fp16 or fp32 checkpoint"
        )


def _stored_as(name: str, model: Any, weights: Collection[str]) -> str:
    """The name that a tensor has in a file: without its prefix where the model was saved without a head."""
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return short if name not in weights and short in weights else name


def _check_every_number(path: Path, values: Mapping[str, Any]) -> None:
    """Raise unless all numbers, however deep they stand, are finite and fit into 64 bits; shares must be shares."""
    waiting: list[tuple[str, Any]] = list(values.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, entry) for entry in value]
        elif isinstance(value, int | float) and not abs(value) < 2**63:
            raise CheckpointError(f"{path}: {name} is {value!r:.60}; correct it, or fetch the config again")
        elif name == "partial_rotary_factor" and isinstance(value, int | float) and not 0 < value <= 1:
            raise CheckpointError(f"{path}: {name} is {value}; it is the share of a head that is rotated, from 0 to 1")
        elif name in POSITIVE and isinstance(value, int | float) and not value > 0:
            raise CheckpointError(f"{path}: {name} is {value}; {POSITIVE[name]}, so it must be positive")
        elif name.endswith("norm_eps") and isinstance(value, int | float) and not value >= 0:
            raise CheckpointError(f"{path}: {name} is {value}; a norm takes the root of a sum with it: it is 0 or more")


def _check_size(path: Path, name: str, value: Any, least: int, most: int | None) -> None:
    if type(value) is not int or value < least:
        raise CheckpointError(f"{path}: {name} is {value!r:.60}; it must be a whole number from {least} on")
    if most is not None and value > most:
        raise CheckpointError(
            f"{path}: {name} is {value:,}, and no tensor of the weights has more than {most:,} rows or columns; fetch "
            "the model again, or correct config.json"
        )


def _has_bytes(weights: StoredWeights, name: str) -> bool:
    """Whether a tensor has elements: the dimensions of one without any could be claimed at will."""
    return all(weights.shape(name))


def _in_layer(module: str) -> str:
    """Path of a module inside its decoder layer, or of one outside the layers as it is."""
    match = _LAYER.match(module + ".")
    return module[match.end() :] if match else module


def _described() -> set[str]:
    """Paths of all modules with weights that any family's decoder layer computes with."""
    return {
        path
        for family in FAMILIES.values()
        for block in family.all_blocks
        for path in (*(projection.path for projection in block.projections), *block.norms, *block.untouched)
    }
