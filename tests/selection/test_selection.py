"""From a table to a plan: the budget is met, the cheapest go first, and what may not be cut is not."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DIVISIBLE, any_scores, exact_scores, geometries, tables
from tiny_families import DENSE

from prunus.errors import BudgetError, OptionError, PlanError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.selection.nearness import NEAR
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, check_reachable, reachable_parameters, select
from prunus.selection.table import build_table


@pytest.fixture
def importance(geometry):
    generator = torch.Generator().manual_seed(0)
    return [{a: torch.rand(w[a], generator=generator).double() for a in AXES} for w in geometry.widths]


@pytest.fixture
def table(geometry, importance):
    return build_table(geometry, importance)


@st.composite
def constraints_for(draw, geometry: Geometry) -> Constraints:
    """Anything that fits a model of this shape."""
    layers = len(geometry.widths)
    start = draw(st.integers(0, layers - 1))
    return Constraints(
        axes=draw(st.sampled_from([AXES, ("attention",), ("mlp",)])),
        layer_start=start,
        layer_end=draw(st.one_of(st.none(), st.integers(start + 1, layers))),
        min_keep_attention=draw(st.integers(0, 3)),
        min_keep_mlp=draw(st.integers(0, 6)),
        align=draw(st.sampled_from([1, 1, 2, 3, 4, 8])),
    )


@st.composite
def jobs(draw, scores=any_scores, constrained: bool = True):
    """A model, its table, constraints and a ratio that they allow."""
    geometry = draw(geometries(sorted(DENSE) if constrained else DIVISIBLE))
    constraints = draw(constraints_for(geometry)) if constrained else Constraints(axes=AXES)
    reachable = reachable_parameters(geometry, constraints) / geometry.total_parameters
    # Just below what is reachable: the product with the total must not round up past it.
    ratio = draw(st.floats(0, 1)) * reachable * (1 - 1e-12)
    return geometry, draw(tables(geometry, scores)), ratio, constraints


def removed_by(plan: Plan, geometry: Geometry) -> int:
    """Parameters that go, counted group by group and block by block."""
    removed = 0
    for before, kept in zip(plan.widths, plan.layers, strict=True):
        for axis in AXES:
            removed += (before[axis] - len(kept[axis])) * geometry.group_parameters[axis]
            if before[axis] and not kept[axis]:
                removed += geometry.block_parameters[axis]
    assert removed == geometry.total_parameters - geometry.parameters_left(plan.kept_widths)
    return removed


def allowed_layers(geometry: Geometry, c: Constraints) -> set[int]:
    layers = len(geometry.widths)
    end = layers if c.layer_end is None else c.layer_end
    return {i for i in range(layers) if c.layer_start <= i < end}


def by_hand(table: pd.DataFrame, geometry: Geometry, ratio: float, c: Constraints) -> Plan:
    """Slow and plain: time and again the cheapest next bundle of any layer, in fractions."""
    queues = {}
    for layer_idx in allowed_layers(geometry, c):
        for axis in c.axes:
            rows = table[(table.layer_idx == layer_idx) & (table.group_type == axis)]
            ranked = sorted(zip(rows.score.map(Fraction), rows.group_idx, strict=True))
            align, min_keep = (c.align, c.min_keep_mlp) if axis == "mlp" else (1, c.min_keep_attention)
            if geometry.family.block(axis).indivisible:
                align = len(rows)
            bundles = []
            while ranked:
                stay = next(n for n in range(len(ranked) - 1, -1, -1) if n % align == 0)
                if stay < min_keep:
                    break
                bundle, ranked = ranked[: len(ranked) - stay], ranked[len(ranked) - stay :]
                last = geometry.block_parameters[axis] if not ranked else 0
                mean = sum(score for score, _ in bundle) / len(bundle)
                cost = geometry.group_parameters[axis] * len(bundle) + last
                bundles.append((mean, [group for _, group in bundle], cost))
            queues[layer_idx, axis] = bundles
    kept = [{axis: set(range(widths[axis])) for axis in AXES} for widths in geometry.widths]
    removed, target = 0, ratio * geometry.total_parameters
    while removed < target:
        _, layer_idx, axis = min((queue[0][0], *key) for key, queue in queues.items() if queue)
        _, groups, cost = queues[layer_idx, axis].pop(0)
        over = removed + cost - target
        if len(groups) > 1 and over > NEAR * geometry.total_parameters and over > target - removed:
            break  # a bundle that is far too much: without it, the cut is nearer
        kept[layer_idx][axis] -= set(groups)
        removed += cost
    return Plan.from_kept(geometry, kept)


# --- the budget ---


@given(job=jobs())
def test_the_budget_is_met_within_one_cut(job):
    geometry, table, ratio, constraints = job
    plan = select(table, geometry, ratio, constraints, last=False)
    removed, target = removed_by(plan, geometry), ratio * geometry.total_parameters
    one_by_one = constraints.align == 1 and not any(block.indivisible for block in geometry.family.blocks)
    assert removed >= target or not one_by_one
    largest = max(
        geometry.group_parameters[axis] * constraints.bundle(geometry.family.block(axis), widths[axis])
        + geometry.block_parameters[axis]
        for widths in geometry.widths
        for axis in AXES
    )
    assert target - largest / 2 <= removed < target + largest or removed == 0
    plan.check_fits(geometry)


@given(job=jobs(constrained=False))
def test_without_the_last_group_the_budget_is_missed(job):
    """Unbundled: putting back the most important group that was cut falls below the target."""
    geometry, table, ratio, constraints = job
    plan = select(table, geometry, ratio, constraints)
    cut = [row for row in table.itertuples() if row.group_idx not in plan.layers[row.layer_idx][row.group_type]]
    if not cut:
        assert ratio * geometry.total_parameters == 0
        return
    last = cut[-1]
    empties = geometry.block_parameters[last.group_type] * (not plan.layers[last.layer_idx][last.group_type])
    assert removed_by(plan, geometry) - last.cost - empties < ratio * geometry.total_parameters


@given(job=jobs(scores=exact_scores))
def test_as_by_hand(job):
    geometry, table, ratio, constraints = job
    assert select(table, geometry, ratio, constraints, last=False) == by_hand(table, geometry, ratio, constraints)


@given(job=jobs())
def test_nothing_is_cut_above_a_cheaper_group_that_stays(job):
    geometry, table, ratio, constraints = job
    plan = select(table, geometry, ratio, constraints, last=False)
    allowed = allowed_layers(geometry, constraints)
    is_kept = [row.group_idx in plan.layers[row.layer_idx][row.group_type] for row in table.itertuples()]
    may_go = table.layer_idx.isin(allowed) & table.group_type.isin(constraints.axes)
    assert all(kept or may for kept, may in zip(is_kept, may_go, strict=True))
    table = table.assign(kept=is_kept)[may_go]
    # Within a layer, the cheapest go first, whatever the bundles.
    for _, rows in table.groupby(["layer_idx", "group_type"]):
        assert rows["kept"].is_monotonic_increasing
    one_by_one = [axis for axis in AXES if constraints.bundle(geometry.family.block(axis), 2) == 1]
    unbundled = table[table.group_type.isin(one_by_one)]
    widths = {key: int(kept) for key, kept in unbundled.groupby(["layer_idx", "group_type"])["kept"].sum().items()}
    above_the_floor = pd.Series(
        [
            widths[row.layer_idx, row.group_type] > constraints.min_keep(row.group_type)
            for row in unbundled.itertuples()
        ],
        index=unbundled.index,
        dtype=bool,
    )
    cut, stays = unbundled[~unbundled.kept], unbundled[unbundled.kept & above_the_floor]
    if set(one_by_one) == set(AXES) and len(cut) and len(stays):
        assert cut["score"].max() <= stays["score"].min() * (1 + 1e-12)


@given(job=jobs())
def test_constraints_are_respected(job):
    geometry, table, ratio, constraints = job
    plan = select(table, geometry, ratio, constraints, last=False)
    allowed = allowed_layers(geometry, constraints)
    for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True)):
        for axis in AXES:
            width = len(kept[axis])
            if layer_idx not in allowed or axis not in constraints.axes:
                assert width == before[axis]
            assert width >= min(before[axis], constraints.min_keep(axis))
            if axis == "mlp" and width != before[axis]:
                assert width % constraints.align == 0
            if geometry.family.block(axis).indivisible:
                assert width in (0, before[axis])


@given(job=jobs(), data=st.data())
def test_the_order_of_rows_does_not_matter(job, data):
    geometry, table, ratio, constraints = job
    order = data.draw(st.permutations(range(len(table))))
    expected = select(table, geometry, ratio, constraints, last=False)
    assert select(table.iloc[order], geometry, ratio, constraints, last=False) == expected
    assert select(table.copy(), geometry, ratio, constraints, last=False).fingerprint == expected.fingerprint


@given(job=jobs(), ratio=st.floats(0, 1))
def test_a_larger_ratio_cuts_all_that_a_smaller_one_cuts(job, ratio):
    geometry, table, larger, constraints = job
    more, fewer = (select(table, geometry, r, constraints, last=False) for r in (larger, larger * ratio))
    for a, b in zip(more.layers, fewer.layers, strict=True):
        assert all(set(a[axis]) <= set(b[axis]) for axis in AXES)


@given(job=jobs())
def test_nothing_to_remove_keeps_everything(job):
    geometry, table, _, constraints = job
    assert select(table, geometry, 0, constraints) == Plan.keep_all(geometry)


@given(geometry=geometries(), data=st.data())
def test_an_unreachable_ratio_names_a_reachable_one(geometry, data):
    constraints = data.draw(constraints_for(geometry))
    reachable = reachable_parameters(geometry, constraints) / geometry.total_parameters
    assert 0 <= reachable < 1
    ratio = data.draw(st.floats(0.001, 0.999))
    assume(ratio > reachable + 1e-9)
    table = data.draw(tables(geometry))
    for fails in (
        lambda: select(table, geometry, ratio, constraints),
        lambda: check_reachable(geometry, ratio, constraints),
    ):
        with pytest.raises(BudgetError, match="the largest reachable ratio is") as raised:
            fails()
    named = float(re.search(r"largest reachable ratio is (\S+)\. ", str(raised.value))[1])
    assert reachable - 1e-4 <= named <= reachable
    plan = select(table, geometry, named, constraints)
    assert removed_by(plan, geometry) >= named * geometry.total_parameters


@given(job=jobs())
def test_what_is_said_to_be_reachable_is_reached(job):
    geometry, table, _, constraints = job
    reachable = reachable_parameters(geometry, constraints)
    plan = select(table, geometry, reachable / geometry.total_parameters * (1 - 1e-12), constraints, last=False)
    one_by_one = constraints.align == 1 and not any(block.indivisible for block in geometry.family.blocks)
    assert removed_by(plan, geometry) >= reachable or not one_by_one
    assert any(kept.attention or kept.mlp for kept in plan.layers)


# --- ties, bundles and other corners ---


def equal_table(geometry: Geometry, value: float) -> pd.DataFrame:
    """Every group of every layer has the same score."""
    return build_table(
        geometry,
        [
            {a: torch.full((w[a],), value * geometry.group_parameters[a], dtype=torch.float64) for a in AXES}
            for w in geometry.widths
        ],
    )


def test_ties_go_by_layer_axis_and_group(geometry):
    table = equal_table(geometry, 0.25)
    share = geometry.group_parameters["attention"] / geometry.total_parameters
    plan = select(table, geometry, 2 * share)
    assert plan.layers[0].attention == (2,)
    assert all(len(kept.attention) == 3 for kept in plan.layers[1:])


@pytest.mark.parametrize("align", [3, 4, 7, 8, 16])
def test_bundles_of_equal_groups_keep_their_order(tiny_model, align):
    """Means of equal scores differ in the last digit; the widths must stay multiples all the same."""
    geometry = Geometry.of(tiny_model("llama", "gqa", intermediate_size=23))
    constraints = Constraints(axes=("mlp",), align=align)
    reachable = reachable_parameters(geometry, constraints) / geometry.total_parameters
    for value in torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist():
        table = equal_table(geometry, value)
        for ratio in (0.2 * reachable, 0.4 * reachable, 0.6 * reachable):
            plan = select(table, geometry, ratio, constraints, last=False)
            assert abs(removed_by(plan, geometry) / geometry.total_parameters - ratio) <= max(NEAR, align * 144 / 2e4)
            for kept in plan.layers:
                assert len(kept.mlp) in (23, *range(0, 23, align))
                assert kept.mlp == tuple(range(23 - len(kept.mlp), 23))


@given(geometry=geometries(), align=st.integers(2, 9), data=st.data())
def test_a_bundle_too_many_is_not_promised(geometry, align, data):
    """With nothing protected the last bundle of some block has to stay, and what is reachable allows for it."""
    constraints = Constraints(axes=AXES, align=align)
    reachable = reachable_parameters(geometry, constraints)
    table, ratio = data.draw(tables(geometry, exact_scores)), reachable / geometry.total_parameters * (1 - 1e-12)
    plan = select(table, geometry, ratio, constraints, last=False)
    assert plan == by_hand(table, geometry, ratio, constraints)
    assert any(kept.attention or kept.mlp for kept in plan.layers)


def test_a_group_in_front_of_an_expensive_one(geometry, importance):
    """Score is importance per cost: a channel, smaller than a head by far, goes only if its share is lower."""
    importance[0]["attention"][1] = 0.0
    importance[3]["mlp"][4] = 0.0
    plan = select(build_table(geometry, importance), geometry, 1e-6)
    assert plan.layers[0].attention == (0, 2)
    assert plan.layers[3].mlp == tuple(range(20)), "zero scores go by layer"
    importance[0]["attention"][1] = 1e-6
    plan = select(build_table(geometry, importance), geometry, 1e-6)
    assert plan.layers[0].attention == (0, 1, 2)
    assert 4 not in plan.layers[3].mlp


def test_the_norm_of_an_emptied_block_counts(geometry, importance):
    """The last group of a block takes the norm along, and the budget knows."""
    importance[1]["attention"][:] = 0.0
    group, block = geometry.group_parameters["attention"], geometry.block_parameters["attention"]
    assert block == 48
    table = build_table(geometry, importance)
    for target, cut in ((3 * group, 3), (3 * group + block, 3), (2 * group, 2)):
        plan = select(table, geometry, (target - 0.5) / geometry.total_parameters)
        assert len(plan.layers[1].attention) == 3 - cut
        assert removed_by(plan, geometry) == cut * group + block * (cut == 3)


def test_floors_larger_than_the_model(table, geometry):
    floors = Constraints(min_keep_attention=99, min_keep_mlp=99)
    assert reachable_parameters(geometry, floors) == 0
    assert select(table, geometry, 0, floors) == Plan.keep_all(geometry)


def test_layer_ranges(table, geometry):
    plan = select(table, geometry, 0.1, Constraints(layer_start=1, layer_end=3))
    assert [kept.widths == before for kept, before in zip(plan.layers, plan.widths, strict=True)] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, 25, math.nan, math.inf])
def test_ratios_out_of_range(table, geometry, ratio):
    for call in (lambda: select(table, geometry, ratio), lambda: check_reachable(geometry, ratio)):
        with pytest.raises(OptionError, match=f"`ratio` is {ratio}; .*must lie in"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ()}, "axes"),
        ({"axes": ("attention", "experts")}, "experts"),
        ({"layer_start": -1}, "`layer_start` is -1"),
        ({"min_keep_attention": -1}, "`min_keep_attention` is -1"),
        ({"min_keep_mlp": -1}, "`min_keep_mlp` is -1"),
        ({"align": 0}, "`align` is 0"),
    ],
)
def test_constraints_that_cannot_be(options, message):
    with pytest.raises(OptionError, match=message):
        Constraints(**options)


@pytest.mark.parametrize(
    "options", [{"layer_start": 4}, {"layer_end": 5}, {"layer_end": 0}, {"layer_start": 2, "layer_end": 2}]
)
def test_layer_ranges_outside_the_model(table, geometry, options):
    with pytest.raises(OptionError, match="no range of the 4 layers"):
        select(table, geometry, 0.1, Constraints(**options))


def test_a_table_of_another_model(table, geometry, tiny_model):
    other = Geometry.of(tiny_model("llama", "gqa", num_hidden_layers=4, intermediate_size=21))
    with pytest.raises(PlanError, match="layer 0 mlp: the table lists 20 groups, the model has 21"):
        select(table, other, 0.1)
    shallow = Geometry.of(tiny_model("llama", "gqa", num_hidden_layers=3))
    with pytest.raises(PlanError, match="layer 3 attention: the table lists 3 groups, the model has 0"):
        select(table, shallow, 0.1)


def test_a_malformed_table(table, geometry):
    with pytest.raises(PlanError, match="no column score"):
        select(table.drop(columns="score"), geometry, 0.1)


def test_the_table_stays_as_it_is(table, geometry):
    before = table.copy(deep=True)
    select(table, geometry, 0.3, Constraints(align=4))
    pd.testing.assert_frame_equal(table, before)
