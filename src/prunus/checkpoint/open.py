"""A model folder as a model whose decoder layers stay on disk until they are held."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from prunus.checkpoint.agreement import unused_tensors, warn_of_unused
from prunus.checkpoint.architecture import empty_model
from prunus.checkpoint.held_dtype import held_dtype
from prunus.checkpoint.load import check_finite_tensor, check_folder, locate, read_tokenizer
from prunus.checkpoint.weights import check_inside
from prunus.errors import CheckpointError
from prunus.machine.placement import resolve_device, resolve_dtype
from prunus.model.families import family_of
from prunus.model.geometry import submodule
from prunus.model.layers import ATTRIBUTE, Fetched, StoredLayers, move_present_, outside_layers
from prunus.model.saved_dtype import save_in_

__all__ = ["attach_layers_", "open_model"]


def open_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device = "cpu",
    scratch: Path | None = None,
) -> tuple[Any, Any]:
    """Open a causal language model without reading its decoder layers.

    Everything in prunus that walks over layers (`prunus.model.layers.layers_of`) reads each from the folder when it is
    needed, and so does the model's own forward.

    Args:
        source: a model folder, the id of a model on the Hugging Face Hub, or `smollm2-135m`.
        dtype: see `prunus.load_model`; a layer is converted when it is held.
        device: where embeddings, final norm, head and the layer at work go.
        scratch: folder for layers that are changed, see `StoredLayers`.

    Returns:
        The model, frozen and in evaluation mode, and its tokenizer.

    Raises:
        OptionError: unknown dtype or device.
        CheckpointError: no such folder or model, it is incomplete or damaged, or its tensors have other names than the
            model's.
        UnsupportedModelError: the family is not described, or the weights are quantised, GGUF or pickles.
        NonFiniteError: a weight is NaN or infinite; of a layer, when it is first read.
    """
    torch_device = resolve_device(device)
    resolve_dtype("auto" if dtype is None else dtype)  # before a model is fetched
    folder = locate(source)
    config, weights = check_folder(folder)
    tokenizer = read_tokenizer(folder)
    stored, torch_dtype = config.dtype, held_dtype(config, dtype, torch_device)
    model = empty_model(config, torch_dtype)
    if dtype == "auto" and torch_dtype != stored:
        save_in_(model, stored)
    if (folder / "generation_config.json").is_file():
        check_inside(folder, "generation_config.json")
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # as of configs
            raise CheckpointError(f"{folder / 'generation_config.json'} cannot be read: {error}") from error
    family = family_of(config)
    prefix = family.layers + "."
    # Tied weights may be stored under either name.
    stored_as = {name: name for name in model.state_dict()}
    if config.tie_word_embeddings and (embedding := f"{family.embedding}.weight") not in weights:
        stored_as[embedding] = f"{family.head}.weight"
    outside = list(outside_layers(model))
    in_layers = [name for name in stored_as if name.startswith(prefix)]
    if missing := [name for name in (*outside, *in_layers) if stored_as[name] not in weights]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of its model, first {missing[0]!r}. If it loads in transformers, "
            "its tensors have other names there: use `engine` resident, or save it again with save_pretrained"
        )
    warn_of_unused(folder, unused_tensors(model, weights))

    def checked(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.to(torch_dtype) if tensor.is_floating_point() else tensor
        if name not in seen:
            check_finite_tensor(name, tensor)
            seen.add(name)
        return tensor

    def fetch_layer(layer_idx: int) -> Fetched:
        start = f"{prefix}{layer_idx}."
        names = [name.removeprefix(start) for name in in_layers if name.startswith(start)]
        return Fetched(
            {name: weights.read(start + name) for name in names},
            # Popped: what was read goes as soon as it is converted.
            lambda state: {name: checked(start + name, state.pop(name)) for name in names},
        )

    seen: set[str] = set()
    outer = {name: checked(name, weights.read(stored_as[name])) for name in outside}
    model.load_state_dict(outer, strict=False, assign=True)
    attach_layers_(model, fetch_layer, torch_device, scratch, weights.verify)
    return model, tokenizer


def attach_layers_(
    model: Any,
    fetch: Callable[[int], Fetched],
    device: torch.device,
    scratch: Path | None,
    verify: Callable[[], None],
) -> None:
    """Give a model that has all but its decoder layers a place to read those from.

    Args:
        model: its layers are on the meta device; the rest is moved to `device`.
        fetch: see `StoredLayers`.
        device: where it computes.
        scratch: see `StoredLayers`.
        verify: see `StoredLayers`.
    """
    if device.type == "cuda" and device.index is None:
        # The thread that reads has a current device of its own.
        device = torch.device("cuda", torch.cuda.current_device())
    move_present_(model, device)
    model.tie_weights()
    model.requires_grad_(False)
    layers = submodule(model, family_of(model.config).layers)
    setattr(model, ATTRIBUTE, StoredLayers(layers, fetch, device, scratch, verify))
