"""What parts of a model cost, against real ones: torch counts FLOPs, a cache is weighed, parameters are summed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries
from tiny_families import CASES, ONE_UNLIKE, case_id, make_model, plan_keeping, random_tokens
from tiny_mixtures import make_mixture
from torch.utils.flop_counter import FlopCounterMode

from prunus.errors import PlanError
from prunus.evaluation.greedy import greedy_run
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.selection.costs import BYTES_PER_NUMBER, amount_of, flop_costs, kv_cache_costs, parameter_costs
from prunus.selection.plan import Plan
from prunus.selection.select import select
from prunus.selection.table import build_table
from prunus.surgery import apply_plan


def ragged(model) -> Plan:
    """Layer 0 loses a group of each axis (or a lone group stays), layer 1 its whole MLP."""
    geometry = Geometry.of(model)
    kept = [
        {axis: range(min(widths[axis], 1), widths[axis]) or range(1) for axis in AXES} for widths in geometry.widths
    ]
    kept[1]["mlp"] = range(0)
    return plan_keeping(geometry, kept)


def counted_flops(model, tokens: int) -> float:
    """Per token, of a pass in which each token's scores are computed against all; rotary angles left out."""
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        model(random_tokens(1, tokens), use_cache=False)
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    return (counts["Global"] - sum(n for name, n in counts.items() if name.endswith("rotary_emb"))) / tokens


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_flops_are_those_that_torch_counts(case):
    model = make_model(*case)
    model.set_attn_implementation("eager")  # of fused attention torch counts nothing on the CPU
    tokens = 6  # no more than the sliding windows: eager attention computes what it then masks
    costs, plan = flop_costs(Geometry.of(model), tokens), ragged(model)
    assert costs.total == counted_flops(model, tokens)
    assert costs.left(plan.kept_widths) == counted_flops(apply_plan(model, plan), tokens)


def test_flops_of_a_mixture_whose_layers_go():
    """The experts that a token goes to leave with their layer, and are no fewer where fewer are left."""
    model = make_mixture("qwen3_moe", num_hidden_layers=4)
    geometry, tokens = Geometry.of(model), 6
    costs = flop_costs(geometry, tokens)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    # Of the router only the rows of two of six experts are counted, which torch counts all.
    router = 2 * geometry.hidden_size * sum(max(0, widths.num_experts - 2) for widths in geometry.widths)
    assert costs.total + router == counted_flops(model, tokens)
    everything = [{axis: range(widths[axis]) for axis in geometry.axes} for widths in geometry.widths]
    last = max(i for i, widths in enumerate(geometry.widths) if widths.num_experts)
    needed = geometry.experts_per_token
    fewer = [{**kept, "expert": range(min(needed, len(kept["expert"])))} for kept in everything]
    assert costs.left(Plan.from_kept(geometry, fewer).kept_widths) == costs.total
    without = [{axis: range(0) for axis in kept} if i == last else kept for i, kept in enumerate(everything)]
    plan = Plan.from_kept(geometry, without)
    again = flop_costs(Geometry.of(apply_plan(model, plan)), tokens)
    assert costs.left(plan.kept_widths) == again.total < costs.total


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cache_bytes_are_those_of_a_real_cache(case):
    model = make_model(*case)
    tokens = 12  # more than the sliding windows hold
    costs, plan = kv_cache_costs(Geometry.of(model), tokens), ragged(model)
    for live, predicted in ((model, costs.total), (apply_plan(model, plan), costs.left(plan.kept_widths))):
        cache = greedy_run(live, random_tokens(1, tokens), 1).cache
        assert predicted == BYTES_PER_NUMBER * sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_parameters_are_those_of_the_model(case):
    model = make_model(*case)
    costs, plan = parameter_costs(Geometry.of(model)), ragged(model)
    assert costs.total == model.num_parameters()
    assert costs.left(plan.kept_widths) == apply_plan(model, plan).num_parameters()


def test_a_long_context_costs_attention_as_far_as_it_sees():
    model = make_model("gemma2", "gqa-tied", num_hidden_layers=4)  # a window of 6 in layers 0 and 2
    geometry = Geometry.of(model)
    assert geometry.windows == (6, None, 6, None)
    costs, at_one = flop_costs(geometry, 100), flop_costs(geometry, 1)
    for layer_idx, seen in enumerate((6, 100, 6, 100)):
        # Two query heads of eight numbers, times keys and times values, two operations each.
        assert costs.group[layer_idx]["attention"] - at_one.group[layer_idx]["attention"] == 2 * 2 * 2 * 8 * (seen - 1)
        assert costs.group[layer_idx]["mlp"] == at_one.group[layer_idx]["mlp"] == 2 * 3 * 48
    kept = kv_cache_costs(geometry, 100)
    assert [layer["attention"] for layer in kept.group] == [2 * 8 * 2 * n for n in (5, 100, 5, 100)]
    assert {layer["mlp"] for layer in kept.group} == {0}


@given(geometry=geometries(), data=st.data())
def test_savings_add_up(geometry, data):
    kept = tuple(
        type(widths)(*(data.draw(st.integers(0, widths[axis])) for axis in AXES)) for widths in geometry.widths
    )
    for costs in (parameter_costs(geometry), flop_costs(geometry, 7), kv_cache_costs(geometry, 7)):
        saved = sum(
            costs.saved(i, axis, before[axis], after[axis])
            for i, (before, after) in enumerate(zip(geometry.widths, kept, strict=True))
            for axis in AXES
        )
        assert costs.left(kept) == costs.total - saved
        assert costs.left(geometry.widths) == costs.total
    assert parameter_costs(geometry).left(kept) == geometry.parameters_left(kept)


def test_sizes_that_cannot_be(geometry):
    huge = Geometry(**{**geometry.__dict__, "hidden_size": 2**60})
    with pytest.raises(PlanError, match="malformed model geometry: a block takes"):
        flop_costs(huge, 7)
    fewer = Geometry(**{**geometry.__dict__, "windows": (None,)})
    for costs in (parameter_costs, lambda g: kv_cache_costs(g, 7)):
        with pytest.raises(PlanError, match="1 windows for 4 layers"):
            costs(fewer)


def test_a_share_is_the_whole_number_that_is_meant():
    """Of every total and every share in hundredths that is a whole number of it, though the product lies beside it."""
    beside = [(h / 100, total) for total in range(1, 700) for h in range(100) if (h / 100) * total != h * total / 100]
    assert len(beside) > 90
    assert all(
        amount_of(h / 100, total) == h * total / 100
        for total in range(1, 700)
        for h in range(100)
        if h * total % 100 == 0
    )
    assert amount_of(0.2, 134_515_008) == 0.2 * 134_515_008
    assert amount_of(0.333, 1000.5) == 0.333 * 1000.5


def test_a_cut_is_no_group_larger_than_asked():
    model = make_model("llama", "gqa", num_hidden_layers=25, num_attention_heads=8, num_key_value_heads=4)
    geometry = Geometry.of(model)
    costs = kv_cache_costs(geometry, 16)
    importance = [{axis: torch.rand(widths[axis]).double() for axis in geometry.axes} for widths in geometry.widths]
    table = build_table(geometry, importance)
    for ratio, groups in ((0.07, 7), (0.14, 14), (0.28, 28), (0.55, 55), (0.3, 30)):
        kept = select(table, geometry, ratio, costs=costs).kept_widths
        assert 100 - sum(widths["attention"] for widths in kept) == groups
