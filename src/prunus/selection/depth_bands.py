"""An axis within a band of depth: what decisions are made for that are finer than an axis and coarser than a layer."""

from __future__ import annotations

from itertools import pairwise

from prunus.model.families import AXES, Axis
from prunus.model.geometry import Geometry

__all__ = ["axes_in_bands"]


def axes_in_bands(geometry: Geometry, bands: int) -> list[tuple[Axis, range]]:
    """Every axis within every band of layers that has groups of it.

    Args:
        geometry: shape of the model.
        bands: number of bands of about equal depth; at most one per layer.
    """
    layers = len(geometry.widths)
    bands = min(bands, layers)
    edges = [layers * number // bands for number in range(bands + 1)]
    ranges = [range(start, stop) for start, stop in pairwise(edges)]
    return [(axis, band) for axis in AXES for band in ranges if any(geometry.widths[i][axis] for i in band)]
