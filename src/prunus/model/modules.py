"""Parts of a model by their path."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from prunus.model.families import Stack

__all__ = ["is_in", "submodule", "tensor_of"]


def submodule(model: nn.Module, path: str) -> Any:
    """`model.get_submodule(path)`, typed loosely: lists of layers and linear modules come out of it alike."""
    return model.get_submodule(path)


def tensor_of(layer: nn.Module, stack: Stack) -> Tensor | None:
    """The parameter or buffer that a stack names; None where there is none."""
    module, _, name = stack.path.rpartition(".")
    try:
        found = getattr(layer.get_submodule(module), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def is_in(name: str, places: Iterable[str]) -> bool:
    """Whether a parameter is that of a path, or of a module there."""
    return any(name == place or name.startswith(place + ".") for place in places)
