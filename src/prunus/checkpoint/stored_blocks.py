"""A model whose weights are stored in blocks, on its way from one folder to another: saved by slicing what is stored.

Everything in prunus works on the decoded weights. What was stored stays beside them: of an opened model, and of one
that is cut out of it, each tensor in the decoder layers is written as the bytes of the experts that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.checkpoint.block_formats import DecodedWeights, format_in
from prunus.checkpoint.conversion import Conversion, Place
from prunus.checkpoint.folder import check_folder
from prunus.errors import UnsupportedModelError
from prunus.files.tensor_file import TensorLayout
from prunus.model.families import family_of
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

__all__ = ["Slice", "StoredBlocks", "attach_blocks_", "blocks_in", "blocks_of"]

#: where a model keeps what it is stored in
ATTRIBUTE = "_prunus_blocks"


@dataclass(frozen=True)
class Slice:
    """A tensor of the result: some entries of a tensor of the files.

    Attributes:
        layout: its dtype and shape.
        read: reads it, on the CPU.
    """

    layout: TensorLayout
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredBlocks:
    """What a model is stored in.

    Attributes:
        weights: the files.
        conversion: of the model that they are of.
        kept: of each layer, the experts that are left, by their numbers in the files.
    """

    weights: DecodedWeights
    conversion: Conversion
    kept: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, weights: DecodedWeights, conversion: Conversion, model: Any) -> StoredBlocks:
        """Those of a whole model.

        Raises:
            UnsupportedModelError: an expert could not be taken out of them.
        """
        kept = tuple(tuple(range(widths.num_experts)) for widths in Geometry.of(model).widths)
        blocks = cls(weights, conversion, kept)
        blocks.slices(model)
        return blocks

    @property
    def title(self) -> str:
        """What people call the format."""
        return self.weights.form.title

    def after(self, plan: Plan, geometry: Geometry) -> StoredBlocks:
        """Those of a model that is cut.

        Args:
            plan: which groups stay.
            geometry: shape of the model before the cut.

        Raises:
            UnsupportedModelError: something else than experts is removed.
        """
        for layer_idx, (layer, widths) in enumerate(zip(plan.layers, geometry.widths, strict=True)):
            if lost := next((a for a in geometry.axes if a != "expert" and len(layer[a]) < widths[a]), None):
                raise UnsupportedModelError(
                    f"the plan removes {lost} groups of layer {layer_idx}, and weights that are stored in {self.title} "
                    "can only lose whole experts: a block is not cut. Plan with `axes=[expert]`, or prune the bf16 "
                    "checkpoint"
                )
        pairs = zip(self.kept, plan.layers, strict=True)
        return replace(self, kept=tuple(tuple(kept[e] for e in layer.expert) for kept, layer in pairs))

    def slices(self, model: Any) -> dict[str, Slice]:
        """The tensors of a model's decoder layers as they are saved, by their names in the files.

        Args:
            model: what is left of the model, in memory or not.

        Raises:
            UnsupportedModelError: an expert cannot be taken out of what is stored.
        """
        family, geometry = family_of(model.config), Geometry.of(model)
        conversion, found = Conversion(model, self.weights), dict[str, Slice]()
        stacks = {stack.path: stack.dim for block in family.all_blocks if block.experts for stack in block.stacks}
        prefix = f"{family.layers}."
        for name in (name for name in conversion.stored if name.startswith(prefix)):
            number, _, inside = name.removeprefix(prefix).partition(".")
            kept = self.kept[int(number)]
            old, new = self.conversion.places(name), conversion.places(name)
            of_experts = geometry.widths[int(number)].num_experts and inside in stacks
            if not new:
                raise self._refused(name)
            for part, place in new.items():
                source = _source(part, place, old, kept) if of_experts else part
                dim = stacks[inside] if of_experts and place is None else None
                if dim is not None and not self.weights.sliceable(source, dim):
                    raise self._refused(name)
                raw = zip(self.weights.raw(source), self.weights.renamed(source, part), strict=True)
                found |= {renamed: self._slice(stored, kept, dim) for stored, renamed in raw}
        return found

    def _slice(self, name: str, kept: Sequence[int], dim: int | None) -> Slice:
        layout = self.weights.raw_layout(name)
        if dim is None:
            return Slice(layout, lambda: self.weights.read_raw(name))
        shape = (*layout.shape[:dim], len(kept), *layout.shape[dim + 1 :])
        if dim == 0:
            return Slice(replace(layout, shape=shape), lambda: self.weights.read_raw(name, list(kept)))
        chosen = torch.tensor(kept, dtype=torch.int64)
        return Slice(replace(layout, shape=shape), lambda: self.weights.read_raw(name).index_select(dim, chosen))

    def _refused(self, name: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{name} is stored in {self.title} in a way that no expert can be taken out of; prune the bf16 checkpoint"
        )


def _source(part: str, place: Place, old: dict[str, Place], kept: Sequence[int]) -> str:
    """Name of the tensor in the files that becomes a part of a smaller model."""
    if place is None:
        return part
    wanted = (kept[place[0]], place[1])
    return next(name for name, where in old.items() if where == wanted)


def blocks_in(folder: Path, model: Any) -> StoredBlocks | None:
    """What the weights in a folder are stored in; None where that is no blocks.

    Args:
        folder: of the model.
        model: the same, without weights.

    Raises:
        CheckpointError, UnsupportedModelError: see `check_folder`, and `StoredBlocks.of`.
    """
    if format_in(folder) is None:
        return None
    weights = check_folder(folder)[1]
    assert isinstance(weights, DecodedWeights)
    return StoredBlocks.of(weights, Conversion(model, weights), model)


def blocks_of(model: Any) -> StoredBlocks | None:
    """What the weights of a model are stored in; None where that is no blocks."""
    blocks: StoredBlocks | None = getattr(model, ATTRIBUTE, None)
    return blocks


def attach_blocks_(model: Any, blocks: StoredBlocks | None) -> None:
    """Say what a model is stored in; None: in tensors as they are in memory."""
    setattr(model, ATTRIBUTE, blocks)
