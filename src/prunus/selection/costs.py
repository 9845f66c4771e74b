"""What cutting saves, of one quantity: the data that selection needs about it.

============ ===========================================================================================
parameters   of the whole model, tied embeddings counted once
FLOPs        of the matrix products of one token's forward pass, head included, 2 per multiplication and
             addition; the token attends to a stated number of tokens
KV cache     bytes of the keys and values of a sequence of stated length, 2 bytes a number (4 beside weights in float32)
latency      measured, see `prunus.selection.latency_profile`
experts      routed experts of all layers
============ ===========================================================================================

A quantity is given by what each block takes as a function of the groups it keeps, and by what is there whatever is cut
(embeddings, head). An expert takes no FLOPs of its own, as a token goes to as many as before; those that it goes to
leave with the layer. Norms, activation functions
and softmax are no matrix products and have no FLOPs here; the two numbers by which transformers' cache counts the
tokens of a layer without attention are no keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunus.errors import PlanError
from prunus.model.families import Axis
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths

__all__ = [
    "BYTES_PER_NUMBER",
    "Costs",
    "amount_of",
    "expert_costs",
    "flop_costs",
    "kv_cache_costs",
    "largest_ratio",
    "parameter_costs",
]

#: of keys and values; a share of them does not depend on it
BYTES_PER_NUMBER = 2


@dataclass(frozen=True, eq=False)
class Costs:
    """What the parts of a model take of a quantity.

    Attributes:
        quantity: its name and unit, as in "30 of 100 parameters".
        fixed: what is there whatever is cut.
        blocks: per decoder layer and axis what the block takes with 0, 1, … all of its groups, of shape (groups + 1,);
            never falling, and 0 without groups.
        group: per decoder layer and axis the price of one group, by which importances are divided. 0 means that
            groups save nothing, and are not cut for this quantity.
    """

    quantity: str
    fixed: float
    blocks: Sequence[Mapping[Axis, np.ndarray]]
    group: Sequence[Mapping[Axis, float]]

    @property
    def total(self) -> Any:
        """What the whole model takes: an int where the quantity is counted, else a float."""
        return self.fixed + sum(layer[axis][-1].item() for layer in self.blocks for axis in layer)

    def left(self, kept: Sequence[LayerWidths]) -> Any:
        """What the model takes once every layer keeps only `kept` groups."""
        return self.fixed + sum(
            layer[axis][widths[axis]].item() for layer, widths in zip(self.blocks, kept, strict=True) for axis in layer
        )

    def saved(self, layer_idx: int, axis: Axis, before: int, after: int) -> Any:
        """What going from `before` to `after` groups in a block saves."""
        curve = self.blocks[layer_idx][axis]
        return (curve[before] - curve[after]).item()

    def and_also(self, other: Costs) -> Costs:
        """What both quantities take together; they are of the same unit and the same model."""
        pairs = list(zip(self.blocks, other.blocks, strict=True))
        groups = zip(self.group, other.group, strict=True)
        return Costs(
            f"{self.quantity} and {other.quantity}",
            self.fixed + other.fixed,
            [{axis: one[axis] + two[axis] for axis in one} for one, two in pairs],
            [{axis: one[axis] + two[axis] for axis in one} for one, two in groups],
        )

    def of_layers(self, layers: Sequence[int]) -> Costs:
        """Those of a model that has only these layers; prices of groups stay what they are."""
        return replace(self, blocks=[self.blocks[i] for i in layers], group=[self.group[i] for i in layers])


def parameter_costs(geometry: Geometry) -> Costs:
    """Parameters. A block's norms leave with its last group, and are not part of a group's price."""

    def curve(layer_idx: int, axis: Axis) -> np.ndarray:
        groups = np.arange(geometry.widths[layer_idx][axis] + 1)
        return groups * geometry.group_parameters[axis] + (groups > 0) * geometry.leaves_with_block(layer_idx, axis)

    fixed = geometry.parameters_left([LayerWidths(0, 0)] * len(geometry.widths))
    return _costs(geometry, "parameters", fixed, curve, lambda _, axis: geometry.group_parameters[axis])


def flop_costs(geometry: Geometry, context: int) -> Costs:
    """FLOPs of one token's forward pass; of a router, those of the experts that the token goes to.

    Args:
        geometry: shape of the model.
        context: tokens that the token attends to, itself included; in a layer with a sliding window no more than fit.
    """

    def group(layer_idx: int, axis: Axis) -> int:
        if axis == "expert":
            return 0
        products = 2 * geometry.group_weights(axis)
        if axis == "attention":
            # Queries times keys, and their softmax times values: a product each of every query head and token.
            products += 4 * geometry.unit("query") * min(context, geometry.windows[layer_idx] or context)
        return products

    def curve(layer_idx: int, axis: Axis) -> np.ndarray:
        groups = np.arange(geometry.widths[layer_idx][axis] + 1)
        if axis == "expert":
            return (groups > 0) * 2 * geometry.experts_per_token * geometry.group_parameters["expert"]
        return groups * group(layer_idx, axis)

    head = 2 * geometry.vocab_size * geometry.hidden_size
    return _costs(geometry, f"FLOPs per token at a context of {context:,}", head, curve, group)


def amount_of(ratio: float, total: float) -> float:
    """How much a share of a quantity is.

    The product in binary floating point may lie just beside the whole number that is meant: 0.55 · 100 is
    55.00000000000001, which a cut of 55 groups would not reach.

    Args:
        ratio: the share.
        total: the quantity.
    """
    product = ratio * total
    whole = round(product)
    return float(whole) if abs(product - whole) <= 1e-9 * product else product


def largest_ratio(reachable: float, total: float) -> float:
    """The share that a quantity is at most, rounded down to four digits, so that one can ask for it."""
    return math.floor(reachable / total * 1e4) / 1e4


def kv_cache_costs(
    geometry: Geometry, context: int, sequences: int = 1, bytes_per_number: int = BYTES_PER_NUMBER
) -> Costs:
    """Bytes of keys and values.

    Args:
        geometry: shape of the model.
        context: tokens of the sequence; a layer with a sliding window of w keeps the last w - 1.
        sequences: how many of them.
        bytes_per_number: of keys and values.
    """

    def group(layer_idx: int, axis: Axis) -> int:
        window = geometry.windows[layer_idx]
        kept = context if window is None else min(context, window - 1)
        return 2 * geometry.unit("key_value") * bytes_per_number * kept * sequences if axis == "attention" else 0

    many = f" of {sequences:,} sequences" if sequences > 1 else ""
    return _linear(geometry, f"KV-cache bytes{many} at a context of {context:,}", 0, group)


def expert_costs(geometry: Geometry) -> Costs:
    """Routed experts, each of which costs 1; nothing else costs anything."""
    return _linear(geometry, "experts", 0, lambda _, axis: int(axis == "expert"))


def _linear(geometry: Geometry, quantity: str, fixed: int, group: Callable[[int, Axis], int]) -> Costs:
    """Costs of which each group takes the same."""

    def curve(layer_idx: int, axis: Axis) -> np.ndarray:
        return np.arange(geometry.widths[layer_idx][axis] + 1) * group(layer_idx, axis)

    return _costs(geometry, quantity, fixed, curve, group)


def _costs(
    geometry: Geometry,
    quantity: str,
    fixed: int,
    curve: Callable[[int, Axis], np.ndarray],
    group: Callable[[int, Axis], int],
) -> Costs:
    layers = range(len(geometry.widths))
    if len(geometry.windows) != len(layers):
        raise PlanError(f"malformed model geometry: {len(geometry.windows)} windows for {len(layers)} layers")
    # Sizes of a damaged file would not fit into the curves' 64 bits.
    largest = max(geometry.widths[i][axis] * group(i, axis) for i in layers for axis in geometry.axes)
    if max(largest, geometry.total_parameters) >= 2**62:
        raise PlanError(f"malformed model geometry: a block takes {largest} {quantity}")
    axes = geometry.axes
    blocks = [{axis: curve(layer_idx, axis) for axis in axes} for layer_idx in layers]
    return Costs(quantity, fixed, blocks, [{axis: group(layer_idx, axis) for axis in axes} for layer_idx in layers])
