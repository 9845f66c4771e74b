"""The original functions of global pruning: importance of a layer's groups, the global table, the groups to prune.

Each takes and returns plain tensors and tables. Which rows and columns belong to a group, what a group costs and how a
table is ranked is the package's (`prunus.model.geometry`, `prunus.selection.table`). With θ a weight, g its gradient, H
its curvature and A the mean activation that enters its column, the importance of a group is, summed over its weights:

    taylor      |θ · g|
    taylor_2nd  |θ · g| + ½ |θ² · H|
    wanda       |θ · A|

A bias belongs to the group of its row. It has no input, so that wanda counts |θ|.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunus.errors import BudgetError, OptionError, PlanError, StatisticsError, UnsupportedModelError
from prunus.importance import get_method
from prunus.model.families import AXES, FAMILIES, Axis, Block, Projection
from prunus.model.geometry import Geometry, LayerWidths, submodule
from prunus.selection.costs import amount_of, largest_ratio
from prunus.selection.select import Constraints, check_ratio
from prunus.selection.table import COLUMNS, Normalization, build_table

__all__ = [
    "build_global_group_table",
    "compute_attention_group_importance_taylor",
    "compute_attention_group_importance_wanda",
    "compute_mlp_group_importance_taylor",
    "compute_mlp_group_importance_wanda",
    "select_groups_to_prune",
]

#: what `importance_info` may hold, by method
INFO_KEYS = {"taylor": ("gradients",), "taylor_2nd": ("gradients", "hessian_diag"), "wanda": ("activations",)}

#: one value per weight of a parameter: (projection, "weight" or "bias", the parameter) → tensor of its shape
_Values = Callable[[Projection, str, nn.Parameter], Tensor]


def compute_attention_group_importance_taylor(
    layer: nn.Module,
    head_dim: int | None = 128,
    gqa_ratio: int | None = 4,
    hessian_diag: Mapping[str, Tensor] | None = None,
    *,
    layer_idx: int | None = None,
) -> Tensor:
    """Taylor importance of a layer's attention groups: a key/value head with the query heads that read it.

    Args:
        layer: a decoder layer after a backward pass: the gradients are read off its parameters. Gradients that add up
            over several backward passes give the sum over them; divide by their number for the mean.
        head_dim: width of a head; None = read it off the layer.
        gqa_ratio: query heads per key/value head; None = read it off the layer.
        hessian_diag: diagonal of the Hessian, or the mean square of the gradients of single sequences in its place;
            adds the second-order term. Keyed by full parameter name (`model.layers.3.self_attn.q_proj.weight`, with
            `layer_idx`) or by projection (`q_proj`; a bias as `q_proj.bias`, and left out it has no second-order term).
        layer_idx: number of the layer, for full parameter names.

    Returns:
        float64 on the CPU, (groups,).

    Raises:
        OptionError: `head_dim` or `gqa_ratio` is not the layer's; the message says what is.
        StatisticsError: a gradient or curvature is missing or of the wrong shape.
        UnsupportedModelError: the layer has no projections that a family of prunus describes.
    """
    return _taylor_of_layer(layer, "attention", hessian_diag, layer_idx, head_dim=head_dim, gqa_ratio=gqa_ratio)


def compute_mlp_group_importance_taylor(
    layer: nn.Module, hessian_diag: Mapping[str, Tensor] | None = None, *, layer_idx: int | None = None
) -> Tensor:
    """Taylor importance of a layer's MLP channels.

    Args:
        layer: a decoder layer after a backward pass.
        hessian_diag: adds the second-order term; keyed as for `compute_attention_group_importance_taylor`
            (`model.layers.3.mlp.up_proj.weight` with `layer_idx`, or `up_proj`).
        layer_idx: number of the layer, for full parameter names.

    Returns:
        float64 on the CPU, (channels,).

    Raises:
        StatisticsError: a gradient or curvature is missing or of the wrong shape.
        UnsupportedModelError: the layer has no projections that a family of prunus describes.
    """
    return _taylor_of_layer(layer, "mlp", hessian_diag, layer_idx)


def compute_attention_group_importance_wanda(
    layer: nn.Module, activations: Mapping[str, Tensor], head_dim: int | None = 128, gqa_ratio: int | None = 4
) -> Tensor:
    """Wanda importance of a layer's attention groups.

    Args:
        layer: a decoder layer.
        activations: mean |input| of q_proj, k_proj, v_proj and o_proj, each (in_features,): an entry of what
            `llama3_global_pruning.collect_layer_activations` returns.
        head_dim: width of a head; None = read it off the layer.
        gqa_ratio: query heads per key/value head; None = read it off the layer.

    Returns:
        float64 on the CPU, (groups,). Values of different layers are not on one scale.

    Raises:
        OptionError: `head_dim` or `gqa_ratio` is not the layer's; the message says what is.
        StatisticsError: activations are missing or of the wrong shape.
        UnsupportedModelError: the layer has no projections that a family of prunus describes.
    """
    geometry, block = _describe_layer(layer, "attention", head_dim, gqa_ratio)
    return _sum_to_groups(geometry, 0, layer, block, _wanda_values(activations, "activations"))


def compute_mlp_group_importance_wanda(layer: nn.Module, activations: Mapping[str, Tensor]) -> Tensor:
    """Wanda importance of a layer's MLP channels.

    Args:
        layer: a decoder layer.
        activations: mean |input| of gate_proj, up_proj and down_proj, each (in_features,).

    Returns:
        float64 on the CPU, (channels,). Values of different layers are not on one scale.

    Raises:
        StatisticsError: activations are missing or of the wrong shape.
        UnsupportedModelError: the layer has no projections that a family of prunus describes.
    """
    geometry, block = _describe_layer(layer, "mlp")
    return _sum_to_groups(geometry, 0, layer, block, _wanda_values(activations, "activations"))


def build_global_group_table(
    model: Any,
    importance_method: str = "taylor",
    importance_info: Mapping[str, Any] | None = None,
    layer_start: int = 0,
    layer_end: int | None = None,
    head_dim: int | None = 128,
    gqa_ratio: int | None = 4,
    normalization: Normalization = "none",
) -> pd.DataFrame:
    """Rank the attention groups and MLP channels of a model in one table.

    Args:
        model: a transformers causal language model.
        importance_method: taylor, taylor_2nd or wanda.
        importance_info: what the method reads.
            taylor: `{"gradients": {parameter name: tensor}}`, or None for the gradients that a backward pass left on
            the model's parameters.
            taylor_2nd: the same with `"hessian_diag": {parameter name: tensor}`.
            wanda: `{"activations": {layer_idx: {projection name: tensor (in_features,)}}}`.
        layer_start: first decoder layer of the table.
        layer_end: one past its last decoder layer; None = all.
        head_dim: width of a head; None = read it off the model.
        gqa_ratio: query heads per key/value head; None = read it off the model.
        normalization: how importances of different layers are made comparable, see `prunus.selection.table.normalize`.

    Returns:
        One row per group with the columns layer_idx, group_type, group_idx, importance, cost and score, sorted by
        score = normalised importance / cost, ascending: what stands first is cut first.

    Raises:
        OptionError: unknown method, layers that the model does not have, or a `head_dim` or `gqa_ratio` that is not the
            model's; the message says what is.
        StatisticsError: what the method reads is missing or of the wrong shape.
        NonFiniteError: an importance is NaN or infinite.
        UnsupportedModelError: the model's family is not described.
    """
    geometry = Geometry.of(model)
    layers = submodule(model, geometry.family.layers)
    chosen = Constraints(layer_start=layer_start, layer_end=layer_end).layers(len(layers))
    _check_heads(head_dim, gqa_ratio, geometry.head_dim, geometry.num_key_value_groups, "the model")
    info = _check_info(importance_method, importance_info)
    comparable = get_method(importance_method).comparable
    if not comparable and normalization == "none":
        warnings.warn(
            f"raw {importance_method} scores of different layers are not on one scale, and a global ranking of them "
            'cuts whole layers blindly; pass normalization="layer_sum" to make them comparable',
            stacklevel=2,
        )
    importance: list[dict[Axis, Tensor]] = []
    for layer_idx, layer in enumerate(layers):
        # Layers outside the range are left out below; zeros keep the numbers of the others in place until then.
        by_axis: dict[Axis, Tensor] = {axis: torch.zeros(geometry.widths[layer_idx][axis]) for axis in AXES}
        if layer_idx in chosen:
            values = _values_from_info(importance_method, info, geometry, layer_idx)
            for block in geometry.family.blocks:
                if geometry.widths[layer_idx][block.axis]:
                    by_axis[block.axis] = _sum_to_groups(geometry, layer_idx, layer, block, values)
        importance.append(by_axis)
    table = build_table(geometry, importance, normalization)
    return table[table["layer_idx"].isin(chosen)].reset_index(drop=True)


def select_groups_to_prune(table: pd.DataFrame, pruning_ratio: float, total_params: int) -> pd.DataFrame:
    """Take the lowest scores until their costs reach a share of the model's parameters.

    Args:
        table: from `build_global_group_table`, or some of its rows.
        pruning_ratio: share of all parameters to remove, in [0, 1).
        total_params: parameters of the whole model, e.g. `model.num_parameters()`.

    Returns:
        The rows to prune, lowest score first. Their costs reach `pruning_ratio * total_params`, and without the last
        row they would not.

    Raises:
        OptionError: the ratio is not in [0, 1), or `total_params` is not positive.
        PlanError: the table lacks columns or has scores that are NaN.
        BudgetError: all groups of the table together are too few; the reachable ratio is named.
    """
    check_ratio(pruning_ratio)
    if total_params <= 0:
        raise OptionError(f"total_params is {total_params}; give the number of parameters of the whole model")
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise PlanError(f"the table has no column {', '.join(missing)}; make it with build_global_group_table")
    if table["score"].isna().any():
        raise PlanError(f"the table has {int(table['score'].isna().sum())} scores that are NaN")
    ranked = table.sort_values(["score", "layer_idx", "group_type", "group_idx"], kind="stable", ignore_index=True)
    target = amount_of(pruning_ratio, total_params)
    # A group is taken as long as those before it fall short of the target.
    chosen = ranked[ranked["cost"].cumsum() - ranked["cost"] < target]
    if (found := int(chosen["cost"].sum())) < target:
        raise BudgetError(
            f"pruning_ratio {pruning_ratio:g} means removing {target:,.0f} of {total_params:,} parameters, but all "
            f"groups of the table together have {found:,}: the largest reachable ratio is "
            f"{largest_ratio(found, total_params):g}. "
            "Lower the ratio, or build the table of more layers"
        )
    return chosen


def _taylor_of_layer(
    layer: nn.Module, axis: Axis, hessian_diag: Mapping[str, Tensor] | None, layer_idx: int | None, **heads: int | None
) -> Tensor:
    geometry, block = _describe_layer(layer, axis, **heads)
    curvature = None
    if hessian_diag is not None:
        curvature = _named(hessian_diag, "hessian_diag", geometry.family.layers, layer_idx, by_projection=True)
    return _sum_to_groups(geometry, 0, layer, block, _taylor_values(_live_gradient, curvature))


def _sum_to_groups(geometry: Geometry, layer_idx: int, layer: nn.Module, block: Block, values: _Values) -> Tensor:
    """Importance of the groups of one block from a value per weight, one parameter at a time."""
    total = torch.zeros(geometry.widths[layer_idx][block.axis], dtype=torch.float64)
    with torch.no_grad():
        for projection in block.projections:
            for parameter, weight in submodule(layer, projection.path).named_parameters():
                # The output bias of a block is nobody's: it stays as long as the block does.
                if parameter == "weight" or projection is not block.output:
                    value = values(projection, parameter, weight)
                    total += geometry.sum_projection_to_groups(layer_idx, block.axis, projection, value).cpu()
    return total


def _taylor_values(gradient: _Values, curvature: _Values | None = None) -> _Values:
    """|θ · g|, and ½ |θ² · H| if there is a curvature; in float32 or wider."""

    def values(projection: Projection, parameter: str, weight: nn.Parameter) -> Tensor:
        theta = weight if weight.dtype == torch.float64 else weight.float()
        importance = (theta * gradient(projection, parameter, weight).to(theta)).abs()
        if curvature is not None:
            importance += 0.5 * (theta.square() * curvature(projection, parameter, weight).to(theta)).abs()
        return importance

    return values


def _wanda_values(activations: Mapping[str, Tensor], what: str) -> _Values:
    """|θ · A|, and |θ| for a bias; in float32 or wider."""

    def values(projection: Projection, parameter: str, weight: nn.Parameter) -> Tensor:
        theta = weight if weight.dtype == torch.float64 else weight.float()
        if parameter == "bias":
            return theta.abs()
        activation = activations.get(projection.name)
        if activation is None:
            raise StatisticsError(f"{what} holds nothing for {projection.name!r}; it has {_some(activations)}")
        _check_shape(activation, (weight.shape[1],), f"{what}[{projection.name!r}]")
        return (theta * activation.to(theta)).abs()

    return values


def _live_gradient(projection: Projection, parameter: str, weight: nn.Parameter) -> Tensor:
    if weight.grad is None:
        raise StatisticsError(
            f"{projection.path}.{parameter} has no gradient. Run loss.backward() on calibration text first"
        )
    return weight.grad


def _named(
    tensors: Mapping[str, Tensor], what: str, layers: str, layer_idx: int | None, *, by_projection: bool
) -> _Values:
    """Look tensors up by full parameter name, or by projection."""

    def values(projection: Projection, parameter: str, weight: nn.Parameter) -> Tensor:
        names = [] if layer_idx is None else [f"{layers}.{layer_idx}.{projection.path}.{parameter}"]
        if by_projection:
            names += [projection.name] if parameter == "weight" else [f"{projection.name}.{parameter}"]
        for name in names:
            if name in tensors:
                _check_shape(tensors[name], weight.shape, f"{what}[{name!r}]")
                return tensors[name]
        if by_projection and parameter == "bias" and projection.name in tensors:
            return torch.zeros_like(weight)
        hint = ""
        if layer_idx is None and any(name.startswith(f"{layers}.") for name in tensors):
            hint = ". For full parameter names, pass layer_idx=<number of the layer> too"
        raise StatisticsError(
            f"{what} holds nothing for {' or '.join(map(repr, names))}; it has {_some(tensors)}{hint}"
        )

    return values


def _check_info(method: str, info: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Raise unless `importance_info` holds what a method reads."""
    if method not in INFO_KEYS:
        known = get_method(method)  # an unknown name raises here, with suggestions
        raise OptionError(
            f"importance_method {known.name!r} is not one of {', '.join(INFO_KEYS)}; for it use "
            f'prunus.score(model, calibration, prunus.ScoringOptions(method="{known.name}"))'
        )
    info = info or {}
    possible = {key for keys in INFO_KEYS.values() for key in keys}
    if unknown := sorted(map(str, info.keys() - possible)):
        raise OptionError(f"importance_info has {', '.join(unknown)}; its keys are {', '.join(sorted(possible))}")
    # Gradients may be on the parameters instead; that they are, is seen when they are read.
    for key in INFO_KEYS[method]:
        if key != "gradients" and key not in info:
            raise StatisticsError(
                f"method {method} needs importance_info={{{key!r}: …}}, and it holds {_some(info)}. "
                + (
                    "collect_layer_activations of llama3_global_pruning makes it"
                    if key == "activations"
                    else "Give the mean square of the gradients of single sequences, by parameter name"
                )
            )
    return info


def _values_from_info(method: str, info: Mapping[str, Any], geometry: Geometry, layer_idx: int) -> _Values:
    if method == "wanda":
        by_layer, what = info["activations"], "importance_info['activations']"
        if layer_idx not in by_layer:
            raise StatisticsError(f"{what} holds nothing for layer {layer_idx}; it has {_some(by_layer)}")
        return _wanda_values(by_layer[layer_idx], f"{what}[{layer_idx}]")

    def named(key: str) -> _Values:
        return _named(info[key], f"importance_info[{key!r}]", geometry.family.layers, layer_idx, by_projection=False)

    def live(projection: Projection, parameter: str, weight: nn.Parameter) -> Tensor:
        try:
            return _live_gradient(projection, parameter, weight)
        except StatisticsError as error:
            raise StatisticsError(
                f"layer {layer_idx}: {error}, or pass importance_info={{'gradients': {{parameter name: tensor}}}}"
            ) from None

    gradient = named("gradients") if "gradients" in info else live
    return _taylor_values(gradient, named("hessian_diag") if method == "taylor_2nd" else None)


def _describe_layer(
    layer: nn.Module, axis: Axis, head_dim: int | None = None, gqa_ratio: int | None = None
) -> tuple[Geometry, Block]:
    """The geometry of one block of a decoder layer that stands alone, from the shapes of its weights."""
    paths = {path for path, module in layer.named_modules() if isinstance(getattr(module, "weight", None), Tensor)}
    for family in FAMILIES.values():
        block = family.block(axis)
        if all(projection.path in paths for projection in block.projections):
            break
    else:
        expected = ", ".join(p.path for p in next(iter(FAMILIES.values())).block(axis).projections)
        raise UnsupportedModelError(
            f"the layer ({type(layer).__name__}) has no {axis} block that a family of prunus describes. Give a decoder "
            f"layer such as model.model.layers[0], with {expected}"
        )
    hidden_size, width = submodule(layer, block.output.path).weight.shape
    groups, unit, ratio = width, 1, 1
    if axis == "attention":
        unit, ratio = _heads_of(layer, block, head_dim)
        _check_heads(head_dim, gqa_ratio, unit, ratio, "the layer")
        groups = width // (unit * ratio)
    widths = LayerWidths(groups, 0) if axis == "attention" else LayerWidths(0, groups)
    geometry = Geometry(
        family=family,
        hidden_size=hidden_size,
        head_dim=unit,
        num_key_value_groups=ratio,
        # Of the model, which nobody gave; importances do not read them.
        vocab_size=0,
        windows=(None,),
        widths=(widths,),
        total_parameters=sum(parameter.numel() for parameter in layer.parameters()),
        group_parameters={},
        block_parameters={},
    )
    for projection in block.projections:
        shape = (sum(geometry.size(0, space) for space in projection.outputs), geometry.size(0, projection.inputs))
        if (found := tuple(submodule(layer, projection.path).weight.shape)) != shape:
            raise UnsupportedModelError(
                f"{projection.path}.weight has shape {found}, the layer's other projections imply {shape}"
            )
    return geometry, block


def _heads_of(layer: nn.Module, block: Block, head_dim: int | None) -> tuple[int, int]:
    """Width of a head, and query heads per key/value head, of a layer.

    The shapes of the weights give the second, but of the first only what it must divide: transformers notes it on the
    attention module, and where there is no note the caller's word is checked against the shapes.
    """
    query = submodule(layer, block.output.path).weight.shape[1]
    reader = next(projection for projection in block.projections if "key_value" in projection.outputs)
    rows = submodule(layer, reader.path).weight.shape[0]
    key_value = (rows - query * reader.outputs.count("query")) // reader.outputs.count("key_value")
    if key_value <= 0 or query % key_value:
        raise UnsupportedModelError(
            f"the layer's {query} query rows are not a multiple of its {key_value} key rows: it has no attention groups"
        )
    noted = getattr(submodule(layer, block.module), "head_dim", head_dim)
    if noted is None:
        raise OptionError("the layer does not say how wide its heads are; pass head_dim")
    if noted <= 0 or key_value % noted:
        raise OptionError(f"head_dim is {noted}, but the layer's keys have {key_value} rows, which it must divide")
    return int(noted), query // key_value


def _check_heads(
    head_dim: int | None, gqa_ratio: int | None, right_head_dim: int, right_gqa_ratio: int, whose: str
) -> None:
    if head_dim not in (None, right_head_dim) or gqa_ratio not in (None, right_gqa_ratio):
        raise OptionError(
            f"head_dim={head_dim}, gqa_ratio={gqa_ratio} do not fit {whose}: its heads are {right_head_dim} wide, and "
            f"{right_gqa_ratio} query head(s) read each key/value head. Pass head_dim={right_head_dim}, "
            f"gqa_ratio={right_gqa_ratio}"
        )


def _check_shape(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise StatisticsError(f"{what} has shape {tuple(tensor.shape)}, and {tuple(shape)} is needed")


def _some(keys: Mapping[Any, Any]) -> str:
    """A few of the keys of a mapping, for a message."""
    shown = ", ".join(map(repr, list(keys)[:3]))
    return (f"{shown}, …" if len(keys) > 3 else shown) or "nothing"
