"""Importances of several sources of text as one.

Gradients of one text may be many times as large as another's: of code as of prose, of noised text as of clean. Their
mean would be what the largest say. So the importances of each source are divided by their sum over the whole model:

    importance_g = T · Σ_s w_s importance_s,g / T_s,      T_s = Σ_g importance_s,g,    T = Σ_s w_s T_s

with w_s the share of the source. Where all sources have the same sum, this is their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunus.model.families import Axis

__all__ = ["mix_sources"]

#: importance of every group: one mapping per decoder layer
Importance = Sequence[Mapping[Axis, Tensor]]


def mix_sources(each: Sequence[Importance], sequences: Sequence[int]) -> list[dict[Axis, Tensor]]:
    """Mix the importances that were measured on several sources; those of one source stay as they are.

    Args:
        each: one for each source, float64 (groups,) per layer and axis.
        sequences: number of sequences of each source, which make its share.
    """
    if len(each) == 1:
        return [dict(layer) for layer in each[0]]
    totals = [
        sum(float(values.abs().sum()) for layer in importance for values in layer.values()) for importance in each
    ]
    mean = sum(number * total for number, total in zip(sequences, totals, strict=True)) / sum(sequences) ** 2
    # A source that says nothing of any group has no part.
    factors = [number * mean / total if total else 0.0 for number, total in zip(sequences, totals, strict=True)]

    def weighted(layers: Sequence[Mapping[Axis, Tensor]], axis: Axis) -> Tensor:
        terms = [factor * layer[axis] for factor, layer in zip(factors, layers, strict=True)]
        return torch.stack(terms).sum(dim=0)

    return [{axis: weighted(layers, axis) for axis in layers[0]} for layers in zip(*each, strict=True)]
