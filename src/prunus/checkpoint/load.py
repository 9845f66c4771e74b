"""A whole model in memory, read from its folder."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from prunus.checkpoint.agreement import warn_of_unused
from prunus.checkpoint.architecture import config_as_weighted
from prunus.checkpoint.block_formats import DecodedWeights
from prunus.checkpoint.folder import check_finite_tensor, check_folder, locate, read_tokenizer
from prunus.checkpoint.held_dtype import held_dtype
from prunus.checkpoint.open import open_model, read_layers_
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.machine.placement import resolve_device, resolve_dtype
from prunus.model.saved_dtype import save_in_

__all__ = ["check_finite", "load_model"]


def load_model(
    source: str | os.PathLike[str], *, dtype: str | torch.dtype | None = "auto", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Load a causal language model that prunus can cut, with its tokenizer.

    Nothing in the folder is executed: no pickle is opened and no code that travels with a model is run.

    Args:
        source: a model folder, the id of a model on the Hugging Face Hub, or `smollm2-135m`.
        dtype: that the weights are held and computed with. `auto` is the checkpoint's own, or float32 where half
            precision is slow (see `prunus.machine.compute_dtype`), and `save_checkpoint` saves in the checkpoint's own
            all the same. None is the checkpoint's own in any case.
        device: where the weights go; `auto` is the first of cuda, mps, cpu.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        OptionError: unknown dtype or device.
        CheckpointError: no such folder or model, or it is incomplete or damaged.
        UnsupportedModelError: the family is not described, or the weights are quantised, GGUF or pickles.
        NonFiniteError: a weight is NaN or infinite.
    """
    torch_device = resolve_device(device)
    resolve_dtype("auto" if dtype is None else dtype)  # before a model is fetched
    folder = locate(source)
    config, weights = check_folder(folder)
    tokenizer = read_tokenizer(folder)
    if isinstance(weights, DecodedWeights):
        raise UnsupportedModelError(
            f"the weights in {folder} are stored in {weights.form.title}: prunus decodes them layer by layer and saves "
            "what is left as it was stored, so that they are never in memory as a whole. Cut it with the streamed "
            "engine (open_model); for anything else use the bf16 checkpoint"
        )
    if weights.whole is not None:
        # transformers has no class that reads a language model from there.
        return read_layers_(open_model(folder, dtype=dtype, device=device)[0]), tokenizer
    stored, held = config.dtype, held_dtype(config, dtype, torch_device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=held,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # what a config with impossible values leads to: a division by zero, for one
        raise CheckpointError(f"the model in {folder} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for, first {missing[0]!r}; transformers "
            "would fill them with random numbers. Fetch the model again, or correct config.json"
        )
    warn_of_unused(folder, report["unexpected_keys"])
    model.config = config_as_weighted(model)
    check_finite(model)
    if dtype == "auto" and held != stored:
        save_in_(model, stored)
    return model.to(torch_device).eval(), tokenizer


def check_finite(model: Any) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        NonFiniteError: names the parameter and, if it is in one, the decoder layer.
    """
    for name, parameter in model.named_parameters():
        check_finite_tensor(name, parameter.detach())
