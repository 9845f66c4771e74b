"""A size to fit, in place of a ratio: which share has to go so that what is left takes no more bytes than asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from prunus.errors import BudgetError, OptionError
from prunus.machine.byte_sizes import parse_bytes, show_bytes
from prunus.model.geometry import Geometry
from prunus.option_values import check_whole
from prunus.selection.constraints import Constraints
from prunus.selection.select import reachable
from prunus.selection.storage import DTYPE_BYTES, FILE_TYPES, blocks_of, check_storage
from prunus.selection.targets import MOST_TOKENS, TargetOptions

__all__ = ["FitOptions", "Fitted"]


@dataclass(frozen=True)
class Fitted:
    """What a size to fit means for a model.

    Attributes:
        ratio: share of the target that has to go.
        target: the bytes that count.
        constraints: the same as before, but that the cut never stays below the ratio, and that widths are whole blocks.
        limit: bytes that may be left.
    """

    ratio: float
    target: TargetOptions
    constraints: Constraints
    limit: int


@dataclass(frozen=True)
class FitOptions:
    """A size that the result has to fit into; it takes the place of the ratio.

    Attributes:
        size: bytes of the weights, e.g. 300MB in the dtype that they are saved in, or 90MB:Q4_K_M as llama.cpp
            quantises them.
        memory: bytes of the weights and the KV cache together, e.g. 6GB or 6GB:Q4_K_M.
        context: tokens of each sequence in the KV cache, for `fit.memory`.
        batch: sequences in the KV cache, for `fit.memory`.
    """

    size: str | None = None
    memory: str | None = None
    context: int = 2048
    batch: int = 1

    def __post_init__(self) -> None:
        if self.size is not None and self.memory is not None:
            raise OptionError("`fit.size` and `fit.memory` are two limits; give one of them")
        check_whole("fit.context", self.context, largest=MOST_TOKENS)
        check_whole("fit.batch", self.batch)
        if self:
            self._limit("float32")

    def check_used(self) -> None:
        """Refuse what would be read by nothing: a user who gives it means something else, or forgot the limit.

        Raises:
            OptionError: a KV cache is described, and none counts.
        """
        if self.memory is None and (self.context, self.batch) != (FitOptions.context, FitOptions.batch):
            raise OptionError(
                "`fit.context` and `fit.batch` are of the KV cache in `fit.memory`; give that as well. Sequences per "
                "pass are `batch_size`"
            )

    def __bool__(self) -> bool:
        return self.size is not None or self.memory is not None

    @property
    def in_gguf(self) -> bool:
        """Whether the size is that of a GGUF file."""
        return self._limit("float32")[1] in FILE_TYPES

    def solved(self, geometry: Geometry, saved_in: str, constraints: Constraints, *, beside: int = 0) -> Fitted:
        """The share to remove from a model.

        Args:
            geometry: its shape.
            saved_in: dtype that its weights are saved in.
            constraints: what may be cut.
            beside: parameters that a checkpoint holds beside the model's, such as those of a tower for images.

        Raises:
            OptionError: the model fits as it is, or what stands beside it does not.
            BudgetError: it cannot be made as small as that under the constraints.
        """
        limit, storage = self._limit(saved_in)
        taken = 0 if storage in FILE_TYPES else beside * DTYPE_BYTES[storage]
        if limit <= taken:
            raise OptionError(
                f"`{self._name}` is {show_bytes(limit)}, and what stands around the language model alone takes "
                f"{show_bytes(taken)}; ask for more, or save the language model alone (`output.text_only`)"
            )
        limit -= taken
        if self.size is not None:
            target = TargetOptions("size", storage=storage)
        else:
            target = TargetOptions("memory", self.context, storage=storage, sequences=self.batch)
        costs = target.costs(geometry)
        if costs.total <= limit:
            raise OptionError(
                f"the model fits as it is: its {costs.quantity} are {show_bytes(costs.total)}, and `{self._name}` "
                f"leaves it {show_bytes(limit)}. Ask for less"
            )
        align = math.lcm(constraints.align, blocks_of(storage))
        constraints = replace(constraints, align=align, at_least=True)
        smallest = math.ceil(costs.total - reachable(geometry, constraints, costs))
        if smallest > limit:
            raise BudgetError(
                f"`{self._name}` leaves the model {show_bytes(limit)}, and its {costs.quantity} are at least "
                f"{smallest:,} bytes under these constraints: ask for more, or relax layer range, min-keep, axes, "
                "align or shape"
            )
        # Rounded down, or a product with the total could ask for a byte more than there is to remove.
        ratio = math.nextafter((costs.total - limit) / costs.total, 0)
        return Fitted(ratio, target, constraints, limit)

    @property
    def _name(self) -> str:
        return "fit.size" if self.size is not None else "fit.memory"

    def _limit(self, saved_in: str) -> tuple[int, str]:
        """Bytes, and how weights are stored."""
        text, colon, storage = str(self.size or self.memory).partition(":")
        return parse_bytes(text, self._name), check_storage(storage.strip()) if colon else saved_in
