"""What enters the columns of each projection, averaged over all calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunus.model.families import Block, Projection
from prunus.model.geometry import Geometry
from prunus.statistics.base import Moment, ProjectionCall, Statistic

__all__ = ["ACTIVATION_STATISTICS", "ActivationStatistic", "ActivationStatistics", "read_activations"]

ActivationStatistic = Literal["mean_abs", "l1", "l2", "mean", "max", "std"]
ACTIVATION_STATISTICS: tuple[ActivationStatistic, ...] = get_args(ActivationStatistic)


class ActivationStatistics(Statistic):
    """Moments of the inputs of every projection, over all tokens of all batches; padding never counts.

    For each projection a layer reports, float64, (in_features,):

        activations.<projection>.sum       Σ_t x_t
        activations.<projection>.abs_sum   Σ_t |x_t|
        activations.<projection>.square    Σ_t x_t²
        activations.<projection>.max       max_t |x_t|
        activations.<projection>.tokens    number of tokens, shape (1,)

    Sums over tokens, not means of batch means: batches weigh by their tokens. `read_activations` makes any of
    `ACTIVATION_STATISTICS` from them.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], dict[str, Tensor]] = {}

    def listens(self, moment: Moment, geometry: Geometry, part: Projection | Block) -> bool:
        """Inputs of all projections; those of a block that read the residual stream share one, taken once."""
        return moment == "input" and isinstance(part, Projection) and part == _first_reader(geometry, part)

    def on_input(self, call: ProjectionCall) -> None:
        """Add a batch."""
        x = call.tokens(call.x).float()
        magnitude = x.abs()
        moments = {
            "sum": x.sum(dim=0).double(),
            "abs_sum": magnitude.sum(dim=0).double(),
            "square": x.square().sum(dim=0).double(),
            "max": magnitude.amax(dim=0).double(),
            "tokens": torch.tensor([len(x)], dtype=torch.float64, device=x.device),
        }
        key = (call.layer_idx, call.projection.name)
        if key not in self._sums:
            self._sums[key] = moments
            return
        before = self._sums[key]
        for name, value in moments.items():
            before[name] = torch.maximum(before[name], value) if name == "max" else before[name] + value

    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """Sums, and maxima, of every projection that is listened to."""
        return [
            (value, "max" if name == "max" else "sum")
            for (layer, _), moments in sorted(self._sums.items(), key=lambda item: item[0])
            if layer == layer_idx
            for name, value in moments.items()
        ]

    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Report the sums under the name of every projection that shares the input."""
        report = {}
        projections = [projection for block in geometry.blocks(layer_idx) for projection in block.projections]
        for projection in projections:
            reader = _first_reader(geometry, projection)
            for name, value in self._sums.get((layer_idx, reader.name), {}).items():
                report[f"activations.{projection.name}.{name}"] = value.cpu()
        for projection in projections:
            self._sums.pop((layer_idx, projection.name), None)
        return report


def read_activations(
    statistics: Mapping[str, Tensor], projection: str, statistic: ActivationStatistic = "mean_abs"
) -> Tensor:
    """One number per input column of a projection.

    ======== ==========================
    mean_abs mean of |x| over tokens
    l1       sum of |x|
    l2       √ of the sum of x²  (Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs", eq. 1)
    mean     mean of x
    max      largest |x|
    std      standard deviation of x
    ======== ==========================

    Returns:
        float64, (in_features,).
    """
    moments = {
        name: statistics[f"activations.{projection}.{name}"] for name in ("sum", "abs_sum", "square", "max", "tokens")
    }
    tokens = moments["tokens"]
    if statistic == "mean_abs":
        return moments["abs_sum"] / tokens
    if statistic == "l1":
        return moments["abs_sum"]
    if statistic == "l2":
        return moments["square"].sqrt()
    if statistic == "mean":
        return moments["sum"] / tokens
    if statistic == "max":
        return moments["max"]
    mean = moments["sum"] / tokens
    return (moments["square"] / tokens - mean.square()).clamp(min=0).sqrt()


def _first_reader(geometry: Geometry, projection: Projection) -> Projection:
    """The first projection of the same block with the same input."""
    block = next(block for block in geometry.family.all_blocks if projection in block.projections)
    return next(other for other in block.projections if other.inputs == projection.inputs)
