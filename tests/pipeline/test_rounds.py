"""Cutting in rounds: each continues what the one before left, in the numbering of the dense model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import plain_recipe, plain_scoring
from strategies import exact_scores, geometries, tables
from tiny_families import ONE_UNLIKE, case_id, make_model, random_tokens

import prunus
from prunus.calibration import calibration_from_tokens
from prunus.errors import OptionError, PlanError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.pipeline.rounds import carry_over, schedule
from prunus.repair.block_repair import RepairOptions
from prunus.scoring.score import score
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, reachable_parameters, select
from prunus.surgery import apply_plan


def test_equal_parts():
    rounds = schedule(0.4, 4)
    assert [step.share for step in rounds] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [step.last for step in rounds] == [False, False, False, True]
    assert [step.scored_on(10) for step in rounds] == [10, 5, 5, 5]
    assert [step.repaired_on(10) for step in rounds] == [2, 2, 2, 10]
    assert [(step.share, step.scored_on(1), step.repaired_on(1)) for step in schedule(0.3, 1)] == [(0.3, 1, 1)]
    with pytest.raises(OptionError, match="`rounds` is 0"):
        schedule(0.3, 0)


@given(data=st.data())
def test_the_table_gives_the_plan_again_and_new_scores_decide_the_rest(data):
    geometry = data.draw(geometries())
    table = data.draw(tables(geometry, exact_scores))
    reachable = reachable_parameters(geometry, Constraints()) / geometry.total_parameters
    first_ratio = data.draw(st.floats(0, 0.6)) * reachable
    plan = select(table, geometry, first_ratio)
    # The model that is left, as its own geometry; scores as anything else.
    widths = tuple(plan.layers[i].widths for i in plan.surviving_layers)
    left = Geometry(
        **{**geometry.__dict__, "widths": widths, "total_parameters": geometry.parameters_left(plan.kept_widths)}
    )
    later = data.draw(tables(left, exact_scores))
    merged = carry_over(table, plan, later)
    assert len(merged) == len(table)
    keys = ["layer_idx", "group_type", "group_idx"]
    assert sorted(map(tuple, merged[keys].values)) == sorted(map(tuple, table[keys].values))
    assert merged["score"].is_monotonic_increasing
    again = select(merged, geometry, first_ratio)
    assert again == plan
    # Of what is left, the new order holds.
    rank = {tuple(row[:3]): number for number, row in enumerate(merged[keys].itertuples(index=False))}
    survivors = plan.surviving_layers
    order = [
        rank[
            (
                survivors[row.layer_idx],
                row.group_type,
                plan.layers[survivors[row.layer_idx]][row.group_type][row.group_idx],
            )
        ]
        for row in later.itertuples()
    ]
    assert order == sorted(order)
    assert all(number >= len(table) - len(later) for number in order)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_rounds_without_repair_are_cuts_one_after_another(case):
    """By hand: score, cut, score what is left, cut that; the composed plan applied at once gives the same weights."""
    model, calibration = make_model(*case), calibration_from_tokens(random_tokens(4, 12))
    geometry = Geometry.of(model)
    # Where attention goes whole, that of one layer is all that both rounds take.
    whole = any(block.indivisible for block in geometry.family.blocks)
    constraints, ratio = Constraints(axes=("mlp",) if whole else AXES), 0.2 if whole else 0.3
    result = prunus.prune(model, ratio, calibration, plain_recipe(selection=constraints, rounds=2), progress=False)
    first = select(score(model, calibration, plain_scoring(), progress=False).table, geometry, ratio / 2, constraints)
    halfway = apply_plan(model, first)
    cut = {(i, axis): set(first.layers[i][axis]) - set(result.plan.layers[i][axis]) for i in range(2) for axis in AXES}
    assert any(cut.values())
    assert all(set(result.plan.layers[i][axis]) <= set(first.layers[i][axis]) for i in range(2) for axis in AXES)
    # What went in the second round are the cheapest of the table of the model halfway.
    again = score(halfway, calibration.split(2)[0], plain_scoring(), progress=False).table  # half of the sequences
    gone = sum(map(len, cut.values()))
    cheapest = {
        (
            first.surviving_layers[row.layer_idx],
            row.group_type,
            first.layers[first.surviving_layers[row.layer_idx]][row.group_type][row.group_idx],
        )
        for row in again[again.group_type.isin(constraints.axes)].head(gone).itertuples()
    }
    assert cheapest == {(*place, group) for place, groups in cut.items() for group in groups}
    at_once = apply_plan(model, result.plan).state_dict()
    assert result.model.state_dict().keys() == at_once.keys()
    assert all(torch.equal(tensor, at_once[name]) for name, tensor in result.model.state_dict().items())
    removed = geometry.total_parameters - result.model.num_parameters()
    assert removed >= ratio * geometry.total_parameters
    assert result.score.about["rounds"] == 2


def test_only_the_last_repair_is_made_on_all_sequences():
    """By hand, with the sequences that each step is to take."""
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(8, 12))
    options, repair = plain_scoring(method="gate_fisher"), RepairOptions()
    result = prunus.prune(model, 0.3, calibration, plain_recipe(options, repair=repair, rounds=2), progress=False)
    geometry = Geometry.of(model)
    first = select(score(model, calibration, options, progress=False).table, geometry, 0.15)
    halfway = apply_plan(model, first)
    prunus.repair_(halfway, model, first, list(calibration.split(6)[0].batches(1)), repair, progress=False)
    later = apply_plan(halfway, result.plan.after(first, Geometry.of(halfway)))
    prunus.repair_(later, model, result.plan, list(calibration.batches(1)), repair, progress=False)
    for name, tensor in later.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor)


def test_constraints_mean_the_same_in_every_round():
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(4, 12))
    constraints = Constraints(layer_start=1, min_keep_mlp=4, align=4)
    result = prunus.prune(model, 0.15, calibration, plain_recipe(selection=constraints, rounds=3), progress=False)
    assert result.plan.layers[0].widths == result.plan.widths[0]
    assert result.plan.layers[1].widths.intermediate_size % 4 == 0
    assert result.plan.layers[1].widths.intermediate_size >= 4


def test_repair_between_rounds_reaches_the_next_scores():
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(6, 12))
    options = plain_scoring(method="gate_fisher")
    plain = prunus.prune(model, 0.3, calibration, plain_recipe(options, rounds=2), progress=False)
    repaired = prunus.prune(
        model, 0.3, calibration, plain_recipe(options, rounds=2, repair=RepairOptions()), progress=False
    )
    importances = [
        result.score.table.set_index(["layer_idx", "group_type", "group_idx"])["importance"]
        for result in (plain, repaired)
    ]
    assert not importances[0].equals(importances[1].reindex(importances[0].index))
    assert len(repaired.repairs) == sum(bool(kept[axis]) for kept in repaired.plan.layers for axis in AXES)


def test_a_plan_after_another():
    model = make_model("llama", "gqa")
    geometry = Geometry.of(model)
    first = Plan.from_kept(geometry, [{"attention": [0, 2], "mlp": range(0, 20, 2)}, {"attention": [], "mlp": [3, 7]}])
    both = Plan.from_kept(geometry, [{"attention": [2], "mlp": [0, 4]}, {"attention": [], "mlp": [7]}])
    later = both.after(first, Geometry.of(apply_plan(model, first)))
    assert [(kept.attention, kept.mlp) for kept in later.layers] == [((1,), (0, 2)), ((), (1,))]
    assert first.compose(later) == both
    with pytest.raises(PlanError, match=r"layer 0, attention: group 0 is to be kept, but is cut already"):
        first.after(both, Geometry.of(apply_plan(model, both)))


def test_a_layer_that_is_gone_stays_gone():
    geometry = Geometry.of(make_model("llama", "gqa"))
    first = Plan.from_kept(geometry, [{"attention": [0], "mlp": [0]}, {"attention": [], "mlp": []}])
    revived = Plan.from_kept(geometry, [{"attention": [0], "mlp": [0]}, {"attention": [], "mlp": [5]}])
    with pytest.raises(PlanError, match="layer 1 is to be kept, but is cut already"):
        revived.after(first, geometry)


def test_importances_of_several_rounds_are_not_normalised_together():
    torch.manual_seed(0)
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(4, 12))
    one, two = (prunus.prune(model, 0.2, calibration, plain_recipe(rounds=rounds), progress=False) for rounds in (1, 2))
    assert len(one.score.ranked("layer_sum").table) == len(two.score.table)
    with pytest.raises(OptionError, match="made in 2 rounds"):
        two.score.ranked("layer_sum")
