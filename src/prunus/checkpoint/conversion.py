"""Names and shapes that the tensors of a model have in files, where they differ from those in memory.

transformers 5 keeps all experts of a layer in one tensor, and files hold one tensor for each. Both ways are its own
(`transformers.core_model_loading`); here they are applied to a few tensors at a time, and to shapes alone.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

__all__ = ["Conversion", "Place", "as_stored"]

#: where a part lies in the tensor that it is a part of: an expert, and rows of it; None = it is all of it
Place = tuple[int, slice] | None
#: operations of transformers that do no more than put tensors side by side: experts, and gate and up of each
_STACKED = [(MergeModulelist, 0)]
_STACKED_PAIRS = [(MergeModulelist, 0), (Concatenate, 1)]


def as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as its files hold them.

    Args:
        model: a causal language model, which may be without weights.
        tensors: of its state dict, or some of them; they may be on the meta device.

    Returns:
        By their names in files; the tensors themselves where nothing differs.
    """
    stored: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return stored


class Conversion:
    """Which tensors of a model's files each tensor of the model is made of.

    A tensor that is in the files under the name that the model has for it is taken as it is.

    Args:
        model: a causal language model, which may be without weights.
        names: of the tensors that there are.

    Attributes:
        stored: name in the model → the tensors that it is made of, by their names in the files, on the meta device.
    """

    def __init__(self, model: Any, names: Collection[str]):
        self._model = model
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        expected: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        self.stored: dict[str, dict[str, Tensor]] = {name: {name: tensor} for name, tensor in expected.items()}
        converted = {name: tensor for name, tensor in expected.items() if name not in names} if transforms else {}
        if converted:
            of: dict[str, dict[str, Tensor]] = {}
            for name, tensor in as_stored(model, converted).items():
                of.setdefault(self._name_in_model(name)[0], {})[name] = tensor
            self.stored |= {name: parts for name, parts in of.items() if name in expected}

    def make(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """A tensor of the model from those of the files that it is made of.

        Args:
            name: in the model.
            parts: those in `stored[name]`, by their names in the files. It is emptied, so that experts are let go while
                they are put together.
        """
        patterns = {part: self._name_in_model(part)[1] for part in parts}
        converter = self._converter(patterns.values())
        if name in parts or converter is None:
            return parts.popitem()[1]
        converter = deepcopy(converter)
        for part in sorted(parts, key=dot_natural_key):
            converter.add_tensor(name, part, patterns[part], parts.pop(part))
        made = converter.convert(name, model=self._model, config=self._model.config)[name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def places(self, name: str) -> dict[str, Place]:
        """Where in a tensor of the model each tensor of the files lies that it is made of.

        Args:
            name: in the model.

        Returns:
            By their names in the files; empty where more is done than putting them side by side, see `make`.
        """
        parts = self.stored[name]
        patterns = {part: self._name_in_model(part)[1] for part in parts}
        converter = self._converter(patterns.values())
        if name in parts or converter is None:
            return dict.fromkeys(parts)
        operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
        if operations not in (_STACKED, _STACKED_PAIRS):
            return {}
        places: dict[str, Place] = {}
        start = 0
        for pattern in converter.source_patterns:
            of_pattern = sorted((part for part in parts if patterns[part] == pattern), key=dot_natural_key)
            rows = parts[of_pattern[0]].shape[0] if of_pattern else 0
            for expert, part in enumerate(of_pattern):
                places[part] = (expert, slice(start, start + rows))
            start += rows
        return places

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors of the files that a tensor of the model is made of; views where it is no more than them.

        Args:
            name: in the model.
            tensor: its values.
        """
        if places := self.places(name):
            return {part: tensor if place is None else tensor[place] for part, place in places.items()}
        return as_stored(self._model, {name: tensor})

    def _converter(self, patterns: Collection[Any]) -> WeightConverter | None:
        return next((c for c in self._converters if any(p in c.source_patterns for p in patterns)), None)

    def _name_in_model(self, name: str) -> tuple[str, Any]:
        """Name in the model of a tensor of the files, and the pattern that a converter knows it by."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters)
        return renamed, pattern
