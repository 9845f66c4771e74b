"""What one pass over calibration data leaves behind.

A statistic follows make / accumulate / finish: it is made empty, the sweep feeds it what flows through the projections
of a layer, and `finish_layer` turns what was accumulated for that layer into named tensors and forgets it.
"""

from prunus.statistics.activations import ActivationStatistics
from prunus.statistics.base import Flow, Routing, Statistic, Statistics
from prunus.statistics.gates import GateGradients
from prunus.statistics.gradients import WeightGradients
from prunus.statistics.routing import RoutingStatistics

__all__ = [
    "ActivationStatistics",
    "Flow",
    "GateGradients",
    "Routing",
    "RoutingStatistics",
    "Statistic",
    "Statistics",
    "WeightGradients",
]
