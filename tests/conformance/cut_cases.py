"""The steps from a tiny model to a cut one, each made once and shared by the tests of the suite."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from tiny_families import random_tokens, shared_model
from torch import Tensor

from prunus.calibration import Batch
from prunus.importance import METHODS as ALL_METHODS
from prunus.importance import MethodOptions, get_method, score_groups
from prunus.importance.registry import statistics_for
from prunus.model.families import AXES, FAMILIES, Axis, Family
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, reachable_parameters, select
from prunus.selection.table import Importance, build_table
from prunus.statistics import Statistics
from prunus.surgery import apply_plan
from prunus.sweep import sweep

#: what chooses the groups where a test is about a cut, and not about how it was chosen
CHOOSER = "random"
#: those that score the groups of a dense model
METHODS = {name: method for name, method in ALL_METHODS.items() if set(AXES) <= set(method.axes)}
CUTS: dict[str, tuple[Axis, ...]] = {"attention": ("attention",), "mlp": ("mlp",), "both": AXES}


@cache
def geometry_of(model_type: str, variant: str) -> Geometry:
    return Geometry.of(shared_model(model_type, variant))


@dataclass(frozen=True)
class Tiny:
    """A small model of a family. The model, and all that is made from it, is shared: leave it as it is."""

    model_type: str
    variant: str

    @property
    def case(self) -> tuple[str, str]:
        return self.model_type, self.variant

    @property
    def model(self) -> Any:
        return shared_model(self.model_type, self.variant)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self.model_type, self.variant)

    @property
    def input_ids(self) -> Tensor:
        return random_tokens()

    @lru_cache(maxsize=64)  # noqa: B019 (a handful of models, for the whole run)
    def statistics(self) -> Statistics:
        """What all methods need, from one sweep."""
        return sweep_for(self, list(METHODS))

    @lru_cache(maxsize=512)  # noqa: B019
    def importance(self, method: str) -> Importance:
        return score_groups(self.model, get_method(method), self.statistics())

    @lru_cache(maxsize=512)  # noqa: B019
    def plan(self, axes: str, method: str = CHOOSER) -> Plan:
        """Half of what can go on these axes goes."""
        return half(self, axes, method, self.importance(method))

    @lru_cache(maxsize=512)  # noqa: B019
    def pruned(self, axes: str, method: str = CHOOSER) -> Any:
        """The model after that plan."""
        return apply_plan(self.model, self.plan(axes, method))


def sweep_for(tiny: Tiny, methods: list[str]) -> Statistics:
    batches = [Batch(random_tokens(2, 10, seed), None) for seed in (5, 6)]
    wanted = statistics_for([METHODS[name] for name in methods], MethodOptions())
    return sweep(tiny.model, batches, wanted, progress=False)


def half(tiny: Tiny, axes: str, method: str, importance: Importance) -> Plan:
    geometry, constraints = tiny.geometry, Constraints(axes=CUTS[axes])
    ratio = 0.5 * reachable_parameters(geometry, constraints) / geometry.total_parameters
    normalization = "none" if METHODS[method].comparable else "layer_sum"
    return select(build_table(geometry, importance, normalization), geometry, ratio, constraints)
