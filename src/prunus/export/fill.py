"""Filling layers up with groups of zeros: the inverse of a cut, for loaders that want other widths than the model has.

A group of zeros adds nothing: its share of the block's output is zero. So the filled model computes what the model
computes, with more memory and more arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.checkpoint import config_as_weighted, empty_model, pruned_config
from prunus.model.dimensions import SPACE_AXIS
from prunus.model.families import Projection
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths

__all__ = ["fill_config", "fill_tensors", "filled_parameters", "largest_widths"]


def largest_widths(widths: Sequence[LayerWidths]) -> tuple[LayerWidths, ...]:
    """The smallest equal widths that hold every layer, each block with at least one group."""
    attention = max(1, *(layer.num_key_value_heads for layer in widths))
    mlp = max(1, *(layer.intermediate_size for layer in widths))
    return (LayerWidths(attention, mlp),) * len(widths)


def fill_config(config: Any, widths: Sequence[LayerWidths]) -> Any:
    """The config of a model whose layers are filled up to `widths`: a stock one where all widths are equal."""
    return pruned_config(config, widths, layer_indices=range(len(widths)))


def filled_parameters(model: Any, widths: Sequence[LayerWidths]) -> int:
    """How many parameters are added to a model whose layers are filled up to `widths`."""
    filled = empty_model(fill_config(config_as_weighted(model), widths), model.dtype)
    return int(filled.num_parameters() - model.num_parameters())


def fill_tensors(model: Any, widths: Sequence[LayerWidths]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model with zero groups behind the groups of each layer.

    A block that is absent and gets groups is all zeros, with norms of ones. Tensors come one at a time, so that no
    second copy of the model has to fit in memory.

    Args:
        model: a causal language model, ragged or not; it stays as it is.
        widths: groups per axis of every decoder layer, none smaller than the model's own.

    Yields:
        Names and tensors as in the state dict of a model with the config that `fill_config` makes of the model's. A
        tensor that is not filled is the model's own, not a copy.
    """
    filled = empty_model(fill_config(config_as_weighted(model), widths), model.dtype)
    before, after = Geometry.of(model), Geometry.of(filled)
    tensors = model.state_dict()
    prefix = before.family.layers + "."
    for name, expected in filled.state_dict().items():
        source = tensors.get(name)
        if source is not None and source.shape == expected.shape:
            yield name, source
            continue
        layer_idx, inside = name.removeprefix(prefix).split(".", 1)
        module, _, parameter = inside.rpartition(".")
        projection = next((p for p in before.family.projections if p.path == module), None)
        # What is neither there nor a projection is the norm of a block that was cut away.
        target = torch.full(expected.shape, float(projection is None), dtype=model.dtype)
        if source is not None and projection is not None:
            _place(target, source, parameter, projection, before, after, int(layer_idx))
        yield name, target


def _place(
    target: Tensor,
    source: Tensor,
    parameter: str,
    projection: Projection,
    before: Geometry,
    after: Geometry,
    layer_idx: int,
) -> None:
    """Copy a projection's rows and columns to the front of their spaces."""
    columns = source.shape[1:] if parameter == "weight" and projection.inputs in SPACE_AXIS else ()
    parts = zip(before.output_parts(layer_idx, projection), after.output_parts(layer_idx, projection), strict=True)
    for (_, start, stop), (_, place, _) in parts:
        rows = slice(place, place + stop - start)
        if columns:
            target[rows, : columns[0]] = source[start:stop]
        else:
            target[rows] = source[start:stop]
