"""The dtype that a model will be saved in, where it is not the one that its weights are held and computed with.

A pruned model's weights are numbers of the dtype that it is saved in from the moment they are made (surgery, repair,
training round them), whatever dtype holds them: what is measured is the model that is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.errors import NonFiniteError
from prunus.model.compact import compact, kept

__all__ = ["round_weights_", "rounded", "save_in_", "saved_dtype"]

#: where a model keeps it
ATTRIBUTE = "_prunus_saved_dtype"


def saved_dtype(model: Any) -> torch.dtype:
    """The dtype that a model will be saved in: what `save_in_` said, else that of its weights."""
    dtype: torch.dtype = getattr(model, ATTRIBUTE, None) or model.dtype
    return dtype


def save_in_(model: Any, dtype: torch.dtype) -> None:
    """Have a model saved in a dtype; its weights stay as they are."""
    setattr(model, ATTRIBUTE, dtype)


def rounded(values: Tensor, dtype: torch.dtype, *, compactly: bool = False) -> Tensor:
    """Values as they will be when they are saved in a dtype, in the dtype that they have.

    Args:
        values: of any shape; what is not floating-point stays as it is.
        dtype: that they will be saved in.
        compactly: a matrix is held in that dtype, see `prunus.model.compact`.

    Returns:
        `values` itself where the dtype holds every one of them: of a file in that dtype, nothing is copied.

    Raises:
        NonFiniteError: a value is too large for the dtype.
    """
    if not values.is_floating_point() or torch.promote_types(kept(values).dtype, dtype) == dtype:
        return values
    as_saved = values.to(dtype)
    if dtype == torch.float16 and bool(as_saved.isinf().any()):
        raise NonFiniteError(
            f"a weight of {float(values.abs().max()):g} is too large for float16, in which the model was to be saved; "
            "use `save_dtype=bfloat16` or float32"
        )
    if compactly:
        return compact(as_saved, values.dtype)
    as_held = as_saved.to(values.dtype)
    return values if torch.equal(as_held, values) else as_held


@torch.no_grad()
def round_weights_(model: Any) -> None:
    """Round the weights of a model in memory to the dtype that it will be saved in."""
    dtype = saved_dtype(model)
    for parameter in model.parameters():
        if (as_saved := rounded(parameter, dtype)) is not parameter:
            parameter.copy_(as_saved)
