"""Matrices that are held in the dtype of their file and computed with in a wider one.

Embeddings and head of a large vocabulary are as large as several decoder layers. A model that is stored in half
precision and computed with in float32 would double them; a `Compact` matrix has the dtype that is computed with, and
the bytes of the one that is stored. Rows that are looked up are converted, and the head's product takes the matrix
piece by piece. Half precision converts to float32 exactly, and every number of a product is one sum as of the whole
matrix: results are those of the converted matrix, to the last bit where BLAS adds up pieces of this shape in one order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

__all__ = ["PIECE", "Compact", "compact", "expand_", "kept", "pieces"]

#: numbers that are converted at a time: 64 MiB in float32
PIECE = 2**24
#: rows and columns of a piece come in multiples of this: BLAS computes some outputs of a product together, and adds
#: the terms of a part of such a group in another order
ALIGNED = 64

#: operations that pick numbers out of a matrix: the others need not be converted
_aten = torch.ops.aten
PICKING = (_aten.embedding.default, _aten.index_select.default, _aten.slice.Tensor, _aten.select.int)


class Compact(Tensor):
    """A matrix whose numbers are held in half the bytes of its dtype. It cannot be written to.

    A lookup of rows converts those rows, the product of a linear layer one piece at a time; any other operation works
    on a converted copy.

    Args:
        kept: the numbers, in the dtype that holds them.
        dtype: that it is computed with; one that holds all numbers of `kept`.

    Attributes:
        kept: as given.
    """

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor, dtype: torch.dtype) -> Compact:
        """A tensor without memory of its own."""
        made: Compact = Tensor._make_wrapper_subclass(cls, kept.shape, dtype=dtype, device=kept.device)
        made.kept = kept.detach()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Before autograd: the product of a linear layer, whose gradient goes through the pieces, too."""
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Everything else."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Compact):
            if func is _aten.detach.default:
                return Compact(first.kept, first.dtype)
            if func in PICKING:
                return func(first.kept, *args[1:], **kwargs).to(first.dtype)
            if func is _aten._to_copy.default:
                return func(first.kept, **{**kwargs, "dtype": kwargs.get("dtype") or first.dtype})
        if func._schema.is_mutable:
            raise TypeError(f"a matrix that is held in another dtype than its own cannot be written to ({func})")
        args, kwargs = tree_map_only(Compact, lambda each: each.kept.to(each.dtype), (args, kwargs))
        return func(*args, **kwargs)


def compact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as a tensor of a dtype; a matrix whose dtype holds fewer numbers stays in it.

    Args:
        values: of any shape.
        dtype: that they are computed with.
    """
    narrower = values.dtype != dtype and torch.promote_types(values.dtype, dtype) == dtype
    return Compact(values, dtype) if values.ndim == 2 and narrower else values.to(dtype)


def kept(values: Tensor) -> Tensor:
    """The tensor that holds the numbers of another one: itself, unless that is `Compact`."""
    return values.kept if isinstance(values, Compact) else values


def pieces(values: Tensor) -> Iterator[Tensor]:
    """A tensor in parts along its first dimension, in its dtype, with only some of a `Compact` one converted."""
    return (values[part] for part in _parts(*values.shape)) if isinstance(values, Compact) else iter([values])


def expand_(model: nn.Module) -> None:
    """Convert what a model holds compactly; tied weights stay tied."""
    converted: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, Compact):
                if parameter not in converted:
                    converted[parameter] = nn.Parameter(parameter.kept.to(parameter.dtype))
                module.register_parameter(name, converted[parameter])


def _parts(size: int, other: int) -> Iterator[slice]:
    """Equal parts of one dimension of a matrix, so that each has at most about `PIECE` numbers.

    Args:
        size: of the dimension.
        other: size of the other one.
    """
    most = max(PIECE // max(other, 1) // ALIGNED, 1) * ALIGNED
    step = math.ceil(size / math.ceil(size / most) / ALIGNED) * ALIGNED
    return (slice(start, start + step) for start in range(0, size, step))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Compact):
        raise TypeError("only the weight of a linear layer may be held in another dtype")
    product: Tensor = _Product.apply(x, weight.kept, bias)
    return product


class _Product(torch.autograd.Function):
    """x Wᵀ + b, with some rows of W converted at a time; of its gradient by x, g W, some columns.

    Either way every number of the result is one sum, in the order of the whole product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
        ctx.kept = kept
        out = x.new_empty((*x.shape[:-1], len(kept)))
        for part in _parts(*kept.shape):
            out[..., part] = functional.linear(x, kept[part].to(x.dtype), None if bias is None else bias[part])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.kept.shape
        out = gradient.new_empty((*gradient.shape[:-1], columns))
        for part in _parts(columns, rows):
            out[..., part] = gradient @ ctx.kept[:, part].to(gradient.dtype)
        return out, None, None
