"""Applying a plan to weights. The only code that reshapes them.

`cut_tensors` works on a stream of named tensors, so that the same function serves a model in memory and a model that is
read tensor by tensor from disk. A plan that keeps everything passes every tensor through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunus.checkpoint.architecture import config_as_weighted, empty_model, pruned_config
from prunus.checkpoint.open import attach_layers_
from prunus.checkpoint.stored_blocks import attach_blocks_, blocks_of
from prunus.model.dimensions import SPACE_AXIS
from prunus.model.families import Block, Projection, Stack
from prunus.model.geometry import Geometry
from prunus.model.layers import Entries, LayerState, Part, StoredLayers, layers_of, outside_layers
from prunus.model.live import live_model
from prunus.model.saved_dtype import rounded, save_in_, saved_dtype
from prunus.model.whole import attach_whole_, whole_of
from prunus.selection.plan import KeptGroups, Plan

__all__ = ["apply_plan", "cut_tensors"]


def apply_plan(model: Any, plan: Plan) -> Any:
    """Cut a model.

    Args:
        model: a transformers causal language model; it stays as it is.
        plan: which groups stay.

    Returns:
        A new, smaller model with its own weights (of an opened model: an opened one, whose layers are cut whenever they
        are read): the family's stock class if every layer keeps the same widths, else
        the class of ragged models that prunus ships with the checkpoint. Dtype, device and generation config are kept,
        and its weights are rounded to the dtype that the model will be saved in (see `prunus.model.saved_dtype`).

    Raises:
        PlanError: the plan was made for a model of another shape.
        UnsupportedModelError: see `live_model` and `Geometry.of`.
    """
    model = live_model(model)
    geometry = Geometry.of(model)
    plan.check_fits(geometry)
    survivors, whole, blocks = plan.surviving_layers, whole_of(model), blocks_of(model)
    blocks = blocks.after(plan, geometry) if blocks else None
    if whole is not None:
        whole.check_layers(survivors)
    config = pruned_config(
        config_as_weighted(model), [plan.layers[i].widths for i in survivors], layer_indices=survivors
    )
    layers, saved = layers_of(model), saved_dtype(model)
    with torch.no_grad():
        smaller = empty_model(config, dtype=model.dtype)
        if saved != model.dtype:
            save_in_(smaller, saved)
        tensors = outside_layers(model) if layers.stored else model.state_dict()
        # Of an opened model, embeddings and head are shared: they can be as large as all experts of a layer.
        untouched = {id(tensor) for tensor in tensors.values() if not layers.stored or tensor.ndim < 2}
        cut = {
            name: rounded(tensor.clone() if id(tensor) in untouched else tensor, saved, compactly=layers.stored)
            for name, tensor in cut_tensors(tensors.items(), geometry, plan)
        }
        smaller.load_state_dict(cut, strict=not layers.stored, assign=True)
        if isinstance(layers, StoredLayers):
            reader = _cut_reader(layers, geometry, plan, saved)
            attach_layers_(smaller, reader, layers.device, layers.scratch, layers.verify)
        smaller.tie_weights()
        if not layers.stored:
            smaller.to(model.device)
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    attach_whole_(smaller, whole)
    attach_blocks_(smaller, blocks)
    smaller.train(model.training)
    return smaller


def _cut_reader(
    layers: StoredLayers, geometry: Geometry, plan: Plan, saved: torch.dtype
) -> Callable[[int, Entries], Sequence[Part]]:
    """What fetches a layer of an opened model and then cuts it; experts that do not stay are not even read."""

    def fetch(new_index: int, entries: Entries) -> Sequence[Part]:
        layer_idx = plan.surviving_layers[new_index]
        kept = plan.layers[layer_idx]
        cut_on_the_way = _kept_entries(geometry, layer_idx, kept)
        read: dict[str, Sequence[int]] = {**entries, **cut_on_the_way}
        for name in cut_on_the_way.keys() & entries.keys():
            read[name] = [cut_on_the_way[name][entry] for entry in entries[name]]

        def cut(part: Part) -> Part:
            def make(state: LayerState) -> Tensor | None:
                tensor: Tensor | None = part.make(state)
                if tensor is not None and part.name not in cut_on_the_way:
                    tensor = _cut_layer_tensor(part.name, tensor, geometry, layer_idx, kept)
                return None if tensor is None else rounded(tensor, saved)

            return replace(part, make=make)

        return [cut(part) for part in layers.fetch(layer_idx, read)]

    return fetch


def _kept_entries(geometry: Geometry, layer_idx: int, kept: KeptGroups) -> dict[str, Sequence[int]]:
    """Of the tensors of a layer that have an entry for every expert along their first dimension: those that stay."""
    return {
        stack.path: kept[block.axis]
        for block in geometry.blocks(layer_idx)
        if block.experts and 0 < len(kept[block.axis]) < geometry.widths[layer_idx][block.axis]
        for stack in block.stacks
        if stack.dim == 0
    }


def cut_tensors(tensors: Iterable[tuple[str, Tensor]], geometry: Geometry, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Cut named tensors one at a time.

    Args:
        tensors: names as in the model's state dict, and their tensors.
        geometry: shape of the model before the cut.
        plan: which groups stay.

    Yields:
        Names as in the smaller model's state dict (layers renumbered), and contiguous tensors; what no cut touches is
        passed through as the same object.
    """
    new_index = {old: new for new, old in enumerate(plan.surviving_layers)}
    prefix = geometry.family.layers + "."
    for name, tensor in tensors:
        if not name.startswith(prefix):
            yield name, tensor
            continue
        number, _, inside = name.removeprefix(prefix).partition(".")
        layer_idx = int(number)
        if layer_idx in new_index:
            cut = _cut_layer_tensor(inside, tensor, geometry, layer_idx, plan.layers[layer_idx])
            if cut is not None:
                yield f"{prefix}{new_index[layer_idx]}.{inside}", cut


def _cut_layer_tensor(name: str, tensor: Tensor, geometry: Geometry, layer_idx: int, kept: KeptGroups) -> Tensor | None:
    module, _, parameter = name.rpartition(".")
    for block in geometry.blocks(layer_idx):
        if not _belongs_to(name, block):
            continue
        groups = kept[block.axis]
        if not groups:
            return None
        if len(groups) == geometry.widths[layer_idx][block.axis]:
            continue
        for projection in block.projections:
            if projection.path == module:
                return _cut_projection(tensor, parameter, projection, geometry, layer_idx, groups)
        for stack in block.stacks:
            if stack.path == name:
                return _cut_stack(tensor, stack, geometry, groups)
    return tensor


def _cut_projection(
    tensor: Tensor, parameter: str, projection: Projection, geometry: Geometry, layer_idx: int, groups: Sequence[int]
) -> Tensor:
    if any(space in SPACE_AXIS for space in projection.outputs):
        rows = torch.cat(
            [
                start + geometry.indices(groups, space) if space in SPACE_AXIS else torch.arange(start, stop)
                for space, start, stop in geometry.output_parts(layer_idx, projection)
            ]
        )
        tensor = tensor.index_select(0, rows.to(tensor.device))
    if parameter == "weight" and projection.inputs in SPACE_AXIS:
        tensor = tensor.index_select(1, geometry.indices(groups, projection.inputs).to(tensor.device))
    return tensor


def _cut_stack(tensor: Tensor, stack: Stack, geometry: Geometry, groups: Sequence[int]) -> Tensor:
    return tensor.index_select(stack.dim, geometry.indices(groups, stack.space).to(tensor.device))


def _belongs_to(name: str, block: Block) -> bool:
    return any(name.startswith(path + ".") for path in (block.module, *block.norms, *block.untouched))
