"""A model folder of a stock class, for loaders that need every layer to have the same shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import (
    config_as_weighted,
    empty_model,
    is_ragged,
    load_model,
    locate,
    model_bytes,
    read_config,
    save_checkpoint,
)
from prunus.errors import OptionError
from prunus.export.fill import fill_config, fill_tensors, largest_widths
from prunus.export.memory import check_export_memory
from prunus.files.json_file import read_json
from prunus.files.outputs import check_disk, check_output, claimed
from prunus.model.whole import attach_whole_, whole_of
from prunus.model.widths import layer_widths_of
from prunus.results.card import license_of

__all__ = ["export_dense", "fill_model"]

FACTS = "export.json"


def export_dense(
    source: str, out: str | Path, *, max_memory: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a ragged model as a folder of its family's stock class, its layers filled up with zero groups.

    The folder loads with no code of prunus in transformers, vLLM, SGLang, … and gives the same logits up to rounding.
    What the cut saved in memory and time is partly given back: every layer is as wide as the widest.

    Args:
        source: folder or Hub id of a model that prunus cut.
        out: the folder to write; complete or not there at all.
        max_memory: memory that may be used, e.g. 8GB; None = as much as there is.
        overwrite: replace an earlier output.

    Returns:
        What was written: parameters before and after, and the widths of every layer.

    Raises:
        OptionError: the layers have equal widths already, so that the folder is of a stock class as it is.
        CheckpointError: `source` cannot be read, or `out` cannot be written.
    """
    with claimed(out, run=("dense", source, overwrite)) as claim:
        if claim.finished:
            return read_json(claim.path / "prunus" / FACTS)
        check_output(out, overwrite, source)
        folder = locate(source)
        config = read_config(folder)
        if not is_ragged(config):
            raise OptionError(
                f"the layers of {source} have equal widths already: it is a {config.model_type!r} model that loads "
                "anywhere as it is"
            )
        equal = fill_config(config, largest_widths(layer_widths_of(config)))
        check_export_memory(source, max_memory, model_bytes(empty_model(equal, config.dtype)))
        model, tokenizer = load_model(folder, dtype=None)
        filled = fill_model(model)
        facts = {
            "source": Path(source).name,
            "parameters_before": model.num_parameters(),
            "parameters_after": filled.num_parameters(),
            "parameters_around": whole.parameters if (whole := whole_of(filled)) is not None else None,
            "num_attention_heads": filled.config.num_attention_heads,
            "num_key_value_heads": filled.config.num_key_value_heads,
            "intermediate_size": filled.config.intermediate_size,
        }
        del model
        check_disk(out, sum(parameter.numel() * parameter.element_size() for parameter in filled.parameters()))
        extras = {FACTS: json.dumps(facts, indent=1) + "\n"}
        save_checkpoint(
            filled, tokenizer, out, card=_card(Path(out).name, facts, folder), extras=extras, overwrite=overwrite
        )
    return facts


def fill_model(model: Any) -> Any:
    """A model of the family's stock class that computes what a ragged model computes.

    Args:
        model: a ragged causal language model; it stays as it is.

    Returns:
        A new model with its own weights, every layer filled up with zero groups to the widest of the model.
    """
    widths = largest_widths(layer_widths_of(model.config))
    with torch.no_grad():
        filled = empty_model(fill_config(config_as_weighted(model), widths), model.dtype)
        own = {tensor.data_ptr() for tensor in model.state_dict().values()}
        weights = {
            name: tensor.clone() if tensor.data_ptr() in own else tensor for name, tensor in fill_tensors(model, widths)
        }
        filled.load_state_dict(weights, assign=True)
        filled.tie_weights()
    attach_whole_(filled, whole_of(model))
    filled.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return filled


def _parameters(facts: dict[str, Any]) -> list[str]:
    """Rows on the parameters: of a multimodal model those of the language model, and all."""
    counts, around = [facts["parameters_before"], facts["parameters_after"]], facts["parameters_around"]
    if around is None:
        return [f"| parameters | {counts[0]:,} | {counts[1]:,} |"]
    return [
        f"| parameters of the language model | {counts[0]:,} | {counts[1]:,} |",
        f"| parameters in all | {counts[0] + around:,} | {counts[1] + around:,} |",
    ]


def _card(name: str, facts: dict[str, Any], folder: Path) -> str:
    task = "image-text-to-text" if facts["parameters_around"] is not None else "text-generation"
    front = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- prunus", "- pruned"]
    front += [f"{field}: {json.dumps(value)}" for field, value in license_of(folder).items()]
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {name}",
            "",
            f"`{facts['source']}`, a pruned model whose layers differ in width, in a form whose layers do not: every "
            "layer is filled up with attention groups and MLP channels of zeros. It is an ordinary model that loads "
            "without further code, and it computes what the pruned model computes.",
            "",
            "| | pruned | this form |",
            "|---|---:|---:|",
            *_parameters(facts),
            "",
            f"Every layer: {facts['num_attention_heads']} query heads, {facts['num_key_value_heads']} key/value heads, "
            f"{facts['intermediate_size']} MLP channels.",
            "",
        ]
    )
