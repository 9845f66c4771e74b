"""A model folder as a model whose decoder layers stay on disk until they are held."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from prunus.checkpoint.architecture import empty_model
from prunus.checkpoint.load import check_finite_tensor, locate, read_small_files, shards_of
from prunus.errors import CheckpointError
from prunus.files.tensor_file import TensorFile
from prunus.machine.placement import resolve_device, resolve_dtype
from prunus.model.families import family_of
from prunus.model.geometry import submodule
from prunus.model.layers import ATTRIBUTE, Fetched, StoredLayers, move_present_, outside_layers

__all__ = ["attach_layers_", "open_model"]


def open_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    scratch: Path | None = None,
) -> tuple[Any, Any]:
    """Open a causal language model without reading its decoder layers.

    Everything in prunus that walks over layers (`prunus.model.layers.layers_of`) reads each from the folder when it is
    needed, and so does the model's own forward.

    Args:
        source: a model folder, the id of a model on the Hugging Face Hub, or `smollm2-135m`.
        dtype: `auto` keeps the checkpoint's dtype.
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
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    folder = locate(source)
    config, tokenizer = read_small_files(folder)
    places = {name: file for shard in shards_of(folder) for file in [TensorFile(shard)] for name in file.entries}
    if torch_dtype == "auto":
        stored = (file.layout(name).dtype for name, file in places.items())
        torch_dtype = config.dtype or next(dtype for dtype in stored if dtype.is_floating_point)
    model = empty_model(config, torch_dtype)
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # as of configs
            raise CheckpointError(f"{folder / 'generation_config.json'} cannot be read: {error}") from error
    prefix = family_of(config).layers + "."
    outside = list(outside_layers(model))
    in_layers = [name for name in model.state_dict() if name.startswith(prefix)]
    if missing := [name for name in (*outside, *in_layers) if name not in places]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of its model, first {missing[0]!r}. If it loads in transformers, "
            "its tensors have other names there: use --engine resident, or save it again with save_pretrained"
        )
    for name, tensor in model.state_dict().items():
        if name in places and places[name].layout(name).shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{places[name].path}: {name!r} has shape {places[name].layout(name).shape}, config.json makes it "
                f"{tuple(tensor.shape)}; fetch the model again, or correct config.json"
            )

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
            {name: places[start + name].read(start + name) for name in names},
            # Popped: what was read goes as soon as it is converted.
            lambda state: {name: checked(start + name, state.pop(name)) for name in names},
        )

    seen: set[str] = set()
    outer = {name: checked(name, places[name].read(name)) for name in outside}
    model.load_state_dict(outer, strict=False, assign=True)
    attach_layers_(model, fetch_layer, torch_device, scratch)
    return model, tokenizer


def attach_layers_(model: Any, fetch: Callable[[int], Fetched], device: torch.device, scratch: Path | None) -> None:
    """Give a model that has all but its decoder layers a place to read those from.

    Args:
        model: its layers are on the meta device; the rest is moved to `device`.
        fetch: see `StoredLayers`.
        device: where it computes.
        scratch: see `StoredLayers`.
    """
    if device.type == "cuda" and device.index is None:
        # The thread that reads has a current device of its own.
        device = torch.device("cuda", torch.cuda.current_device())
    move_present_(model, device)
    model.tie_weights()
    model.requires_grad_(False)
    layers = submodule(model, family_of(model.config).layers)
    setattr(model, ATTRIBUTE, StoredLayers(layers, fetch, device, scratch))
