"""What one pass over calibration data leaves behind.

A statistic follows make / accumulate / finish: it is made empty, the sweep feeds it the calls of a layer's projections
and experts, and `finish_layer` turns what was accumulated for that layer into named tensors and forgets it.
"""

from prunus.statistics.activations import ActivationStatistics
from prunus.statistics.base import ExpertsCall, Moment, ProjectionCall, Statistic, Statistics
from prunus.statistics.gates import GateGradients
from prunus.statistics.gradients import WeightGradients
from prunus.statistics.routing import RoutingStatistics

__all__ = [
    "ActivationStatistics",
    "ExpertsCall",
    "GateGradients",
    "Moment",
    "ProjectionCall",
    "RoutingStatistics",
    "Statistic",
    "Statistics",
    "WeightGradients",
]
