"""What selection may do with experts."""

from __future__ import annotations

import pytest
import torch
from tiny_mixtures import CHOSEN, EXPERTS, make_mixture, shared_mixture

from prunus.errors import BudgetError, OptionError, PlanError, UnsupportedModelError
from prunus.importance import METHODS, score_groups
from prunus.model.geometry import Geometry
from prunus.pipeline.recipe import Recipe
from prunus.scoring.score import ScoringOptions
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, check_reachable, select
from prunus.selection.table import build_table
from prunus.selection.targets import TargetOptions
from prunus.surgery import apply_plan


@pytest.fixture
def mixture():
    return shared_mixture("glm4_moe", "one-dense")


@pytest.fixture
def geometry(mixture) -> Geometry:
    return Geometry.of(mixture)


@pytest.fixture
def table(mixture, geometry):
    return build_table(geometry, score_groups(mixture, METHODS["random"]))


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.5, 2 / 3])
def test_a_share_of_the_experts(table, geometry, share):
    """As many go as come to the share, or one more, in every layer that has some; nothing else is touched."""
    plan = select(table, geometry, share, costs=TargetOptions("experts").costs(geometry))
    going = next(n for n in range(EXPERTS) if n / EXPERTS >= share - 1e-9)
    # Of six experts, one is a sixth: nearer shares are taken where more than two points too much would go.
    going = min((going, going - 1), key=lambda n: abs(n / EXPERTS - share)) if going / EXPERTS - share > 0.02 else going
    assert [kept.expert and EXPERTS - len(kept.expert) for kept in plan.layers] == [(), going]
    for before, kept in zip(plan.widths, plan.layers, strict=True):
        assert (len(kept.attention), len(kept.mlp)) == (before.num_key_value_heads, before.intermediate_size)


def test_a_share_of_all_parameters_goes_in_experts(table, geometry):
    half = 3 * geometry.group_parameters["expert"] / geometry.total_parameters
    plan = select(table, geometry, half)
    assert plan.kept_widths[1].num_experts == 3
    assert plan.kept_widths[1].intermediate_size == geometry.widths[1].intermediate_size


def test_as_many_stay_as_each_token_goes_to(table, geometry):
    costs = TargetOptions("experts").costs(geometry)
    with pytest.raises(BudgetError, match=rf"ratio is 0\.6666.*goes to {CHOSEN} experts .*keeps at least {CHOSEN}"):
        check_reachable(geometry, 0.7, costs=costs)
    with pytest.raises(BudgetError, match=r"largest reachable ratio is 0\.3333"):
        select(table, geometry, 0.5, Constraints(min_keep_expert=4), costs)
    one = [{axis: range(widths[axis]) for axis in geometry.axes} for widths in geometry.widths]
    one[1]["expert"] = [3]
    with pytest.raises(PlanError, match=r"layer 1: the plan keeps 1 of 6 experts.* each token to 2"):
        Plan.from_kept(geometry, one).check_fits(geometry)


def test_what_does_not_fit_is_named(mixture, geometry):
    with pytest.raises(OptionError, match="`shape=ragged`: no class loads a mixture"):
        Constraints(shape="ragged").of(geometry)
    with pytest.raises(OptionError, match="shared experts and of layers without experts"):
        check_reachable(geometry, 0.01, Constraints(axes=("mlp",)))
    with pytest.raises(OptionError, match=r"`axes` has mlp, of which Mixtral has no groups; it has attention, expert"):
        Constraints(axes=("mlp",)).of(Geometry.of(shared_mixture("mixtral", "gqa")))
    with pytest.raises(OptionError, match=r"`method` wanda says nothing about expert groups.*one of .*reap"):
        Recipe(scoring=ScoringOptions(method="wanda")).of(geometry)
    with pytest.raises(OptionError, match="adaptive cuts layers unequally"):
        Recipe(scoring=ScoringOptions(method="adaptive")).of(geometry)
    with pytest.raises(OptionError, match="parts of `method` hybrid score groups of different kinds"):
        Recipe(scoring=ScoringOptions(method="hybrid", hybrid=(("reap", 0.5), ("taylor", 0.5)))).of(geometry)
    reap = build_table(geometry, [{"expert": torch.arange(w.num_experts).double()} for w in geometry.widths])
    with pytest.raises(OptionError, match=r"`axes` has attention, of which the table says nothing \(it is of expert\)"):
        select(reap, geometry, 0.1, Constraints(axes=("attention", "expert")))


def test_methods_of_experts_and_dense_models(geometry, llama):
    dense = Geometry.of(llama)
    with pytest.raises(OptionError, match=r"`method` reap scores expert groups, and .* has attention and mlp groups"):
        score_groups(llama, METHODS["reap"])
    with pytest.raises(BudgetError, match="the model has no experts that could be removed"):
        check_reachable(dense, 0.5, costs=TargetOptions("experts").costs(dense))


def test_uneven_experts_have_no_class(mixture, geometry):
    uneven = [{axis: range(widths[axis]) for axis in geometry.axes} for widths in geometry.widths]
    uneven[1]["mlp"] = range(8)
    with pytest.raises(UnsupportedModelError, match=r"loads a glm4_moe model.*`shape=uniform`"):
        apply_plan(mixture, Plan.from_kept(geometry, uneven))


def test_depth_takes_whole_layers(mixture, table, geometry):
    """A dense layer or one with experts; the others keep their kind."""
    model = make_mixture("qwen3_moe", "renormalised-one-dense", num_hidden_layers=3)
    shape = Geometry.of(model)
    ranked = build_table(shape, score_groups(model, METHODS["random"]))
    for ratio in (0.15, 0.5):
        plan = select(ranked, shape, ratio, Constraints(shape="depth"), last=False)
        smaller = apply_plan(model, plan)
        assert Geometry.of(smaller).widths == tuple(plan.kept_widths[i] for i in plan.surviving_layers)
        assert smaller.num_parameters() == shape.parameters_left(plan.kept_widths)


def test_routing_by_groups_of_experts_is_refused():
    grouped = make_mixture("glm4_moe", n_group=2, topk_group=1)
    with pytest.raises(UnsupportedModelError, match="routes by 2 groups of experts"):
        Geometry.of(grouped)


def test_flops_do_not_fall_with_experts(geometry):
    """A token goes to as many experts as before, and to none where the layer has none left."""
    costs = TargetOptions("flops", context=8).costs(geometry)
    assert all(layer.get("expert", 0) == 0 for layer in costs.group)
    attention = 2 * sum(costs.blocks[i]["attention"][-1] for i in range(2)) / 2
    inside = 2 * CHOSEN * geometry.group_parameters["expert"]
    assert costs.total == costs.fixed + attention + sum(layer["mlp"][-1] for layer in costs.blocks) + inside
    assert costs.fixed == 2 * geometry.vocab_size * geometry.hidden_size
    assert costs.blocks[1]["expert"].tolist() == [0, *[inside] * geometry.widths[1].num_experts]
