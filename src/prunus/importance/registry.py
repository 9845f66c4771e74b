"""The registry of methods, and how a method is applied to a whole model."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prunus.errors import OptionError, StatisticsError
from prunus.model.families import ALL_AXES, Axis
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.option_values import check_seed
from prunus.statistics import (
    ActivationStatistics,
    GateGradients,
    RoutingStatistics,
    Statistic,
    Statistics,
    WeightGradients,
)
from prunus.statistics.activations import ACTIVATION_STATISTICS, ActivationStatistic
from prunus.statistics.gradients import LossScale

__all__ = [
    "COMPOSITES",
    "HESSIANS",
    "METHODS",
    "Hessian",
    "LayerEvidence",
    "Method",
    "MethodOptions",
    "get_method",
    "method",
    "score_groups",
    "statistics_for",
]

Hessian = Literal["mean_loss", "empirical_fisher", "sampled_fisher"]
HESSIANS: tuple[Hessian, ...] = get_args(Hessian)


@dataclass(frozen=True)
class MethodOptions:
    """What a method can be told.

    Attributes:
        hessian: what stands in for the diagonal of the Hessian where a method wants one. `mean_loss`: mean square of
            the gradients of single sequences, each of the mean loss of its tokens. `empirical_fisher`: the same of the
            sum of its tokens' losses, which is the loss's own scale. `sampled_fisher`: of that sum with tokens drawn
            from the model's own predictions in place of the text's, an unbiased estimate of the Gauss-Newton matrix;
            it takes a second backward pass. `gate_fisher` knows the last two.
        activation: which statistic of the activations `wanda` multiplies weights with.
        random_seed: of the `random` control, and of the labels of `sampled_fisher`.
    """

    hessian: Hessian = "mean_loss"
    activation: ActivationStatistic = "mean_abs"
    random_seed: int = 0

    def __post_init__(self) -> None:
        if self.random_seed is not None:
            check_seed("random_seed", self.random_seed)
        if self.hessian not in HESSIANS:
            raise OptionError(f"`hessian` {self.hessian!r} is unknown; choose one of {', '.join(HESSIANS)}")
        if self.activation not in ACTIVATION_STATISTICS:
            raise OptionError(
                f"`activation` {self.activation!r} is unknown; choose one of {', '.join(ACTIVATION_STATISTICS)}"
            )


@dataclass(frozen=True)
class LayerEvidence:
    """All that a method may look at for one layer.

    Attributes:
        geometry: shape of the model.
        layer_idx: the decoder layer.
        weights: parameters of the layer's projections by name inside the layer, e.g. `mlp.up_proj.weight`.
        statistics: what the sweep took for this layer.
        axes: what the method is asked about.
    """

    geometry: Geometry
    layer_idx: int
    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    axes: tuple[Axis, ...] = ALL_AXES

    def sum_to_groups(self, axis: Axis, values: Mapping[str, Tensor]) -> Tensor:
        """One value per weight to one per group, see `Geometry.sum_to_groups`."""
        return self.geometry.sum_to_groups(self.layer_idx, axis, values)

    def projection_weights(self, axis: Axis) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors of an axis' weights and biases that belong to groups."""
        block = self.geometry.block(self.layer_idx, axis)
        for projection in block.projections if block else ():
            for parameter in ("weight", "bias"):
                name = f"{projection.path}.{parameter}"
                if name in self.weights:
                    yield name, self.weights[name]
        for stack in block.stacks if block else ():
            if stack.path in self.weights:
                yield stack.path, self.weights[stack.path]


LayerImportance = Callable[[LayerEvidence, MethodOptions], dict[Axis, Tensor]]


@dataclass(frozen=True)
class Method:
    """A way of saying what groups are worth.

    Attributes:
        name: as users write it.
        summary: one line.
        needs: what it reads of the statistics: any of gradients, squares, activations, gates, routing; empty = weights
            alone.
        importance: one layer's evidence → axis → importance, float64 (groups,).
        comparable: whether raw scores of different layers are on one scale.
        axes: the kinds of group that it says something about, as far as a model has them.
    """

    name: str
    summary: str
    needs: frozenset[str]
    importance: LayerImportance
    comparable: bool
    axes: tuple[Axis, ...] = ALL_AXES

    def axes_of(self, geometry: Geometry) -> tuple[Axis, ...]:
        """The kinds of group of a model that it says something about.

        Raises:
            OptionError: none.
        """
        axes = tuple(axis for axis in geometry.axes if axis in self.axes)
        if not axes:
            raise OptionError(
                f"`method` {self.name} scores {' and '.join(self.axes)} groups, and {geometry.family.title} has "
                f"{' and '.join(geometry.axes)} groups; choose another method"
            )
        return axes


METHODS: dict[str, Method] = {}
#: methods made of other methods, which look at the whole table, with one line about each
COMPOSITES: dict[str, str] = {
    "hybrid": "Hybrid: a weighted sum of other methods, each normalised first (`prunus.scoring.hybrid`).",
    "adaptive": "Adaptive: the method and scale per axis that are best on held-out text (`prunus.scoring.adaptive`).",
}


def method(
    name: str, *, needs: Iterable[str] = (), comparable: bool = True, axes: tuple[Axis, ...] = ALL_AXES
) -> Callable[[LayerImportance], LayerImportance]:
    """Register a method under a name; its summary is the first line of the function's docstring."""

    def register(function: LayerImportance) -> LayerImportance:
        summary = (function.__doc__ or "").partition("\n")[0]
        METHODS[name] = Method(name, summary, frozenset(needs), function, comparable, axes)
        return function

    return register


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        OptionError: there is none of that name; close names are suggested.
    """
    if name in METHODS:
        return METHODS[name]
    if name in COMPOSITES:
        raise OptionError(
            f"method {name!r} is made of other methods and cannot be a part; choose from {', '.join(METHODS)}"
        )
    known = [*METHODS, *COMPOSITES]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise OptionError(f"`method` {name!r} is unknown.{hint} Choose one of {', '.join(known)}.")


def statistics_for(methods: Iterable[Method], options: MethodOptions, *, experts: bool = False) -> list[Statistic]:
    """The statistics that some methods need together, each taken once.

    Args:
        methods: whose.
        options: see `MethodOptions`.
        experts: the model has experts: where there is a pass at all, note how many tokens each gets.

    Source: Kunstner et al. 2019, "Limitations of the Empirical Fisher Approximation for Natural Gradient Descent",
    eqs. 3-5, for the two Fisher matrices.
    """
    needs = frozenset[str]().union(*(method.needs for method in methods))
    scale: LossScale = "mean" if options.hessian == "mean_loss" else "sum"
    sampled = options.hessian == "sampled_fisher"
    squares = "squares" in needs
    statistics: list[Statistic] = []
    if needs & {"gradients", "squares"}:
        statistics.append(WeightGradients(squares=squares and not sampled, loss_scale=scale))
    if squares and sampled:
        statistics.append(WeightGradients(means=False, squares=True, loss_scale=scale, labels="sampled"))
    if "activations" in needs:
        statistics.append(ActivationStatistics())
    if "gates" in needs:
        statistics.append(GateGradients(labels="sampled" if sampled else "text"))
    if "routing" in needs or (needs and experts):
        statistics.append(RoutingStatistics(outputs="routing" in needs))
    return statistics


def score_groups(
    model: Any, method: Method, statistics: Statistics | None = None, options: MethodOptions | None = None
) -> list[dict[Axis, Tensor]]:
    """Importance of every group of a model.

    Args:
        model: a transformers causal language model.
        method: see `get_method`.
        statistics: from a sweep with `statistics_for([method], …)`; None for a method that needs none.
        options: see `MethodOptions`.

    Returns:
        One mapping per decoder layer: axis → float64 (groups,) on the CPU.

    Raises:
        StatisticsError: statistics that the method needs are missing, or are of another model.
    """
    geometry = Geometry.of(model)
    options = options or MethodOptions()
    layers = layers_of(model)
    by_layer: Sequence[Mapping[str, Tensor]] = statistics.layers if statistics else [{}] * len(layers)
    if len(by_layer) != len(layers):
        raise StatisticsError(f"the statistics are of {len(by_layer)} layers, the model has {len(layers)}")
    axes = method.axes_of(geometry)
    importance = []
    for layer_idx, seen in enumerate(by_layer):
        try:
            with layers.hold(layer_idx, then=layer_idx + 1) as layer:
                weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
                groups = method.importance(LayerEvidence(geometry, layer_idx, weights, seen, axes), options)
                del weights
        except KeyError as error:
            raise StatisticsError(
                f"layer {layer_idx}: method {method.name!r} needs the statistic {error}, which was not taken; "
                f"it needs a sweep that takes {', '.join(sorted(method.needs)) or 'nothing'}"
            ) from error
        if missing := [axis for axis in axes if axis not in groups]:
            raise StatisticsError(
                f"method {method.name!r} gives no importances of {missing[0]} groups, which {geometry.family.title} "
                "has; register it with the axes that it scores: @method(…, axes=…)"
            )
        for axis in axes:
            if groups[axis].shape != (expected := (geometry.widths[layer_idx][axis],)):
                raise StatisticsError(
                    f"layer {layer_idx}, {axis}: the statistics are of another model: they give importances of shape "
                    f"{tuple(groups[axis].shape)}, the model's groups are {expected}"
                )
        importance.append({axis: groups[axis].to("cpu", torch.float64) for axis in axes})
    return importance
