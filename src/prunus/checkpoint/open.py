"""A model folder as a model whose decoder layers stay on disk until they are held."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from prunus.checkpoint.agreement import unused_tensors, warn_of_unused
from prunus.checkpoint.architecture import empty_model
from prunus.checkpoint.block_formats import DecodedWeights
from prunus.checkpoint.conversion import Conversion, Place
from prunus.checkpoint.folder import check_finite_tensor, check_folder, locate, read_tokenizer
from prunus.checkpoint.held_dtype import held_dtype
from prunus.checkpoint.stored_blocks import StoredBlocks, attach_blocks_
from prunus.checkpoint.weights import StoredWeights
from prunus.errors import CheckpointError
from prunus.files.links import check_inside
from prunus.machine.placement import resolve_device, resolve_dtype
from prunus.model.compact import compact, expand_, kept
from prunus.model.families import family_of
from prunus.model.layers import (
    ATTRIBUTE,
    Entries,
    LayerState,
    Part,
    StoredLayers,
    layers_of,
    move_present_,
    outside_layers,
)
from prunus.model.modules import submodule
from prunus.model.saved_dtype import save_in_
from prunus.model.whole import attach_whole_

__all__ = ["attach_layers_", "open_model", "read_layers_"]


def open_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device = "cpu",
    scratch: Path | None = None,
) -> tuple[Any, Any]:
    """Open a causal language model without reading its decoder layers.

    Everything in prunus that walks over layers (`prunus.model.layers.layers_of`) reads each from the folder when it is
    needed, and so does the model's own forward. Embeddings and head stay in the dtype of the folder where `dtype` is
    a wider one (see `prunus.model.compact`).

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
    stored, held = config.dtype, held_dtype(config, dtype, torch_device)
    model = empty_model(config, held)
    if (dtype == "auto" or isinstance(weights, DecodedWeights)) and held != stored:
        save_in_(model, stored)
    _read_generation_config_(model, folder)
    conversion = Conversion(model, weights)
    stored_as = _names_in_folder(model, weights, conversion)
    warn_of_unused(folder, unused_tensors(model, weights))
    prefix, checked, places_of = family_of(config).layers + ".", _Checked(model), cache(conversion.places)

    def fetch_layer(layer_idx: int, entries: Entries) -> list[Part]:
        start = f"{prefix}{layer_idx}."
        names = [name.removeprefix(start) for name in stored_as if name.startswith(start)]
        return [fetch_tensor(start, name, entries.get(name)) for name in names]

    def fetch_tensor(start: str, inside: str, entries: Sequence[int] | None) -> Part:
        name = start + inside
        places = places_of(name)

        def read() -> LayerState:
            if places:
                return {inside: _put_together(weights, places, entries)}
            return {part: weights.read(part) for part in stored_as[name]}

        def make(state: LayerState) -> Tensor:
            if places:
                return checked(name, state.pop(inside), whole=entries is None)
            whole = conversion.make(name, state)
            return checked(name, whole if entries is None else whole[list(entries)], whole=entries is None)

        def announce() -> None:
            for part, wanted in _wanted(places or dict.fromkeys(stored_as[name]), entries):
                weights.will_need(part, wanted)

        return Part(inside, read, make, announce)

    outer = {}
    for name, empty in outside_layers(model).items():
        outer[name] = compact(weights.read(stored_as[name][0]).to(torch_device), empty.dtype)
        check_finite_tensor(name, kept(outer[name]))
    model.load_state_dict(outer, strict=False, assign=True)
    attach_layers_(model, fetch_layer, torch_device, scratch, weights.verify)
    attach_whole_(model, weights.whole)
    if isinstance(weights, DecodedWeights):
        attach_blocks_(model, StoredBlocks.of(weights, conversion, model))
    return model, tokenizer


def _put_together(weights: StoredWeights, places: Mapping[str, Place], entries: Sequence[int] | None) -> Tensor:
    """A tensor that lies in files in parts, each read to where it belongs.

    Args:
        weights: the files.
        places: of the parts, see `Conversion.places`.
        entries: along the first dimension that are wanted; None = all.
    """
    stacked = {name: place for name, place in places.items() if place is not None}
    layout = weights.layout(next(iter(places)))
    if not stacked:
        (name,) = places
        if entries is None:
            return weights.read(name)
        out = torch.empty((len(entries), *layout.shape[1:]), dtype=layout.dtype)
        for number, entry in enumerate(entries):
            weights.read_into(name, out[number], entry)
        return out
    wanted = sorted({expert for expert, _ in stacked.values()}) if entries is None else entries
    number_of = {expert: number for number, expert in enumerate(wanted)}
    rows = max(part.stop for _, part in stacked.values())
    out = torch.empty((len(wanted), rows, *layout.shape[1:]), dtype=layout.dtype)
    for name, (expert, part) in stacked.items():
        if expert in number_of:
            weights.read_into(name, out[number_of[expert], part])
    return out


def _wanted(places: Mapping[str, Place], entries: Sequence[int] | None) -> Iterator[tuple[str, Sequence[int] | None]]:
    """The tensors of the files that `_put_together` reads, and the entries of each; None = all."""
    for name, place in places.items():
        if place is None:
            yield name, entries
        elif entries is None or place[0] in entries:
            yield name, None


def read_layers_(model: Any) -> Any:
    """Read all layers of an opened model into memory; it is an ordinary model from then on."""
    layers = layers_of(model)
    assert isinstance(layers, StoredLayers)
    for layer_idx, layer in enumerate(layers.modules):
        layer.load_state_dict(layers.read(layer_idx), assign=True)
        del layer.forward  # that of the class shows again
    expand_(model)
    delattr(model, ATTRIBUTE)
    attach_blocks_(model, None)
    return model.requires_grad_(True)


def _read_generation_config_(model: Any, folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    check_inside(folder, path)
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # as of configs
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _names_in_folder(model: Any, weights: StoredWeights, conversion: Conversion) -> dict[str, list[str]]:
    """The tensors of its folder that each tensor of a model is made of; all are there.

    Tied weights may have either name.
    """
    family = family_of(model.config)
    names = {name: list(parts) for name, parts in conversion.stored.items()}
    if model.config.tie_word_embeddings and (embedding := f"{family.embedding}.weight") not in weights:
        names[embedding] = [f"{family.head}.weight"]
    in_layers = [name for name in names if name.startswith(f"{family.layers}.")]
    wanted = [part for name in (*outside_layers(model), *in_layers) for part in names[name]]
    if missing := [part for part in wanted if part not in weights]:
        raise CheckpointError(
            f"{weights.folder} lacks {len(missing)} tensors of its model, first {missing[0]!r}. If it loads in "
            "transformers, its tensors have other names there: use `engine=resident`, or save it again with "
            "save_pretrained"
        )
    return names


class _Checked:
    """Converts tensors to their dtypes in a model, and refuses NaN and infinite values when one is first seen."""

    def __init__(self, model: Any):
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._seen: set[str] = set()

    def __call__(self, name: str, tensor: Tensor, whole: bool = True) -> Tensor:
        tensor = tensor.to(self._dtypes[name]) if tensor.is_floating_point() else tensor
        if name not in self._seen:
            check_finite_tensor(name, tensor)
            if whole:
                self._seen.add(name)
        return tensor


def attach_layers_(
    model: Any,
    fetch: Callable[[int, Entries], Sequence[Part]],
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
    family = family_of(model.config)
    # A layer's experts are most of its memory, and a token goes to few of them: reading takes little of the time.
    ahead = family.mixture is None
    layers = submodule(model, family.layers)
    setattr(model, ATTRIBUTE, StoredLayers(layers, fetch, device, scratch, verify, ahead))
