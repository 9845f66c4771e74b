"""Hypothesis strategies: shapes of models, importances and plans."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from prunus.families import AXES, FAMILIES
from prunus.groups import Geometry, LayerWidths
from prunus.plan import KeptGroups, Plan
from prunus.table import build_table

#: scores whose sums are exact in floating point, with many ties
exact_scores = st.integers(0, 12).map(lambda n: n / 4)
any_scores = st.one_of(st.just(0.0), st.floats(1e-9, 1e9))


@st.composite
def layer_widths(draw: Any, max_layers: int = 5, max_attention: int = 4, max_mlp: int = 14) -> tuple[LayerWidths, ...]:
    """Widths of layers, ragged ones too; at least one block is there."""
    layer = st.builds(LayerWidths, st.integers(0, max_attention), st.integers(0, max_mlp))
    layers = draw(st.lists(layer, min_size=1, max_size=max_layers))
    if not any(widths[axis] for widths in layers for axis in AXES):
        layers[0] = LayerWidths(1, 1)
    return tuple(layers)


@st.composite
def geometries(draw: Any) -> Geometry:
    """Shapes of models; costs are free, as long as they add up."""
    widths = draw(layer_widths())
    there = {axis: any(layer[axis] for layer in widths) for axis in AXES}
    group = {axis: draw(st.integers(1, 40)) if there[axis] else 0 for axis in AXES}
    block = {axis: draw(st.integers(0, 30)) if there[axis] else 0 for axis in AXES}
    rest = draw(st.integers(1, 200))
    inside = sum(layer[axis] * group[axis] + bool(layer[axis]) * block[axis] for layer in widths for axis in AXES)
    return Geometry(
        family=FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))],
        hidden_size=8,
        head_dim=2,
        num_key_value_groups=draw(st.integers(1, 3)),
        widths=widths,
        total_parameters=rest + inside,
        group_parameters=group,
        block_parameters=block,
    )


@st.composite
def tables(draw: Any, geometry: Geometry, scores: st.SearchStrategy[float] = any_scores, **options: Any) -> Any:
    """A global table for a model of this shape; importance is score times cost."""
    importance = [
        {
            axis: torch.tensor(
                draw(st.lists(scores, min_size=widths[axis], max_size=widths[axis])), dtype=torch.float64
            )
            * geometry.group_parameters[axis]
            for axis in AXES
        }
        for widths in geometry.widths
    ]
    return build_table(geometry, importance, **options)


@st.composite
def plans(draw: Any, widths: tuple[LayerWidths, ...] | None = None, model_type: str | None = None) -> Plan:
    """A plan for layers of these widths; it keeps at least one group somewhere."""
    widths = widths or draw(layer_widths())
    model_type = model_type or draw(st.sampled_from(sorted(FAMILIES)))
    kept = [[[group for group in range(layer[axis]) if draw(st.booleans())] for axis in AXES] for layer in widths]
    if not any(groups for layer in kept for groups in layer):
        layer_idx, number = next((i, k) for i, layer in enumerate(widths) for k, a in enumerate(AXES) if layer[a])
        kept[layer_idx][number] = [0]
    return Plan(model_type, widths, tuple(KeptGroups(*map(tuple, layer)) for layer in kept))
