"""Shapes of a cut: equal widths and whole layers, against plans that were searched by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from plain import plain_recipe, plain_scoring
from strategies import geometries, tables
from tiny_families import DENSE, ONE_UNLIKE, case_id, make_model

import prunus
from prunus.errors import BudgetError, OptionError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths
from prunus.selection.nearness import NEAR
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, reachable_parameters, select
from prunus.selection.table import build_table

whole_scores = st.integers(0, 1000).map(float)


def removed_by(plan: Plan, geometry: Geometry) -> int:
    return geometry.total_parameters - geometry.parameters_left(plan.kept_widths)


def lost_by(plan: Plan, table) -> float:
    worth = {(r.layer_idx, r.group_type, r.group_idx): r.score * r.cost for r in table.itertuples()}
    kept = {(i, axis, group) for i, layer in enumerate(plan.layers) for axis in AXES for group in layer[axis]}
    return sum(value for key, value in worth.items() if key not in kept)


def can_be_uniform(geometry: Geometry) -> bool:
    """Every layer has both blocks, and those that are indivisible are equal."""
    return all(
        min(widths) and (min(widths) == max(widths) or not block.indivisible)
        for block in geometry.family.blocks
        for widths in [[layer[block.axis] for layer in geometry.widths]]
    )


@st.composite
def jobs(draw, shape: str):
    """A model, its table, constraints of a shape and a ratio that they allow."""
    geometry = draw(geometries(sorted(DENSE)).filter(lambda g: shape == "depth" or can_be_uniform(g)))
    narrowest = min(layer.intermediate_size for layer in geometry.widths)
    constraints = Constraints(
        shape=shape,
        align=draw(st.sampled_from([n for n in (1, 1, 2, 3) if n <= narrowest or n == 1])),
        min_keep_attention=draw(st.sampled_from([0, 0, 1])),
        min_keep_mlp=draw(st.sampled_from([0, 0, 2])) if narrowest > 2 else 0,
    )
    share = reachable_parameters(geometry, constraints) / geometry.total_parameters
    return geometry, draw(tables(geometry, whole_scores)), draw(st.floats(0, 1)) * share * (1 - 1e-12), constraints


@given(job=jobs("uniform"))
def test_uniform_loses_the_least_that_equal_widths_can(job):
    geometry, table, ratio, constraints = job
    plan, target = select(table, geometry, ratio, constraints, last=False), ratio * geometry.total_parameters
    assert len(set(plan.kept_widths)) == 1
    width = plan.kept_widths[0]
    narrowest = {axis: min(layer[axis] for layer in geometry.widths) for axis in AXES}
    equal = {axis: len({layer[axis] for layer in geometry.widths}) == 1 for axis in AXES}

    def fits(axis: str, n: int) -> bool:
        if equal[axis] and n == narrowest[axis]:
            return True
        if geometry.family.block(axis).indivisible:
            return False
        align, min_keep = (
            (constraints.align, constraints.min_keep_mlp) if axis == "mlp" else (1, constraints.min_keep_attention)
        )
        return n % align == 0 and n >= min_keep

    assert all(fits(axis, width[axis]) for axis in AXES)
    # Every pair of widths that meets the budget and cannot keep another bundle of channels: none loses less.
    by_widths, others = {}, []
    for attention, channels in product(range(1, narrowest["attention"] + 1), range(1, narrowest["mlp"] + 1)):
        if not (fits("attention", attention) and fits("mlp", channels)):
            continue
        kept = []
        for layer_idx in range(len(geometry.widths)):
            layer = {}
            for axis, keep in (("attention", attention), ("mlp", channels)):
                rows = table[(table.layer_idx == layer_idx) & (table.group_type == axis)]
                order = sorted(zip(rows.score, rows.group_idx, strict=True))
                layer[axis] = [group for _, group in order[len(order) - keep :]]
            kept.append(layer)
        other = Plan.from_kept(geometry, kept)
        others.append(other)
        if removed_by(other, geometry) >= target:
            by_widths[attention] = (channels, other)  # the most channels, as they ascend
    by_widths = {
        attention: found
        for attention, found in by_widths.items()
        if removed_by(found[1], geometry) <= target + NEAR * geometry.total_parameters
    }
    if not by_widths:  # all would be far too much: the nearest
        assert abs(removed_by(plan, geometry) - target) == min(abs(removed_by(o, geometry) - target) for o in others)
        return
    assert removed_by(plan, geometry) >= target
    assert width.intermediate_size == by_widths[width.num_key_value_heads][0]
    assert lost_by(plan, table) <= min(lost_by(other, table) for _, other in by_widths.values())


@given(job=jobs("depth"))
def test_depth_removes_the_layers_of_least_mean_importance(job):
    geometry, table, ratio, constraints = job
    assume(not constraints.min_keep_attention and not constraints.min_keep_mlp)
    plan = select(table, geometry, ratio, constraints, last=False)
    means = {i: (rows.score * rows.cost).sum() / rows.cost.sum() for i, rows in table.groupby("layer_idx")}
    gone = [i for i in means if i not in plan.surviving_layers]  # a model may have layers without anything, too
    for layer_idx in plan.surviving_layers:
        assert plan.kept_widths[layer_idx] == geometry.widths[layer_idx]
        assert all((means[i], i) < (means[layer_idx], layer_idx) for i in gone)
    target, total = ratio * geometry.total_parameters, geometry.total_parameters
    removed = removed_by(plan, geometry)
    nothing = LayerWidths(0, 0)
    if gone:
        dearest = max(gone, key=lambda i: (means[i], i))
        less = [layer if i != dearest else geometry.widths[i] for i, layer in enumerate(plan.kept_widths)]
        before = total - geometry.parameters_left(less)
        assert before < target
        assert removed - target <= max(NEAR * total, target - before)
    if removed < target:
        after = min(plan.surviving_layers, key=lambda i: (means[i], i))
        more = [layer if i != after else nothing for i, layer in enumerate(plan.kept_widths)]
        assert total - geometry.parameters_left(more) - target > max(NEAR * total, target - removed)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
@pytest.mark.parametrize("shape", ["uniform", "depth"])
def test_results_are_of_a_stock_class(case, shape):
    model = make_model(*case, num_hidden_layers=4, **({"max_window_layers": 4} if case[0] == "qwen2" else {}))
    # Without its attention, OLMo 2 has less to give in equal widths.
    ratio = 0.2 if case[0] == "olmo2" else 0.3
    smaller = prunus.prune(
        model,
        ratio,
        recipe=plain_recipe(plain_scoring(method="random", random_seed=1), Constraints(shape=shape)),
    ).model
    assert type(smaller).__module__.startswith("transformers.models.")
    # Of four layers no other number, and of few channels no other width, would be nearer.
    assert abs(1 - smaller.num_parameters() / model.num_parameters() - ratio) < 0.13
    assert (smaller.config.num_hidden_layers < 4) == (shape == "depth")


@pytest.fixture
def table(geometry):
    generator = torch.Generator().manual_seed(0)
    return build_table(
        geometry, [{a: torch.rand(w[a], generator=generator).double() for a in AXES} for w in geometry.widths]
    )


def test_depth_of_one_axis_removes_whole_blocks(table, geometry):
    plan = select(table, geometry, 0.15, Constraints(shape="depth", axes=("mlp",)))
    assert {layer.num_key_value_heads for layer in plan.kept_widths} == {3}
    assert {layer.intermediate_size for layer in plan.kept_widths} == {0, 20}


def test_depth_keeps_frozen_layers(table, geometry):
    plan = select(table, geometry, 0.2, Constraints(shape="depth", layer_start=1, layer_end=3))
    assert {0, len(geometry.widths) - 1} < set(plan.surviving_layers)


def test_what_cannot_go_together(table, geometry):
    with pytest.raises(OptionError, match="layer range"):
        select(table, geometry, 0.2, Constraints(shape="uniform", layer_start=1))
    with pytest.raises(OptionError, match="choose one of auto, ragged, uniform, depth"):
        Constraints(shape="round")
    with pytest.raises(BudgetError, match="shape"):
        select(table, geometry, 0.5, Constraints(shape="depth", min_keep_mlp=1))
    ragged = Plan.from_kept(
        geometry, [{"attention": range(3 - i % 2), "mlp": range(20)} for i in range(len(geometry.widths))]
    )
    narrower = Geometry(**{**geometry.__dict__, "widths": ragged.kept_widths})
    with pytest.raises(OptionError, match="2 to 3 attention groups"):
        prunus.selection.select.check_reachable(narrower, 0.1, Constraints(shape="uniform", axes=("mlp",)))
