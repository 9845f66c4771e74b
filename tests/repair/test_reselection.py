"""Choosing channels anew, against elimination that tries every candidate, and against repair of the plan it finds."""

from __future__ import annotations

import pytest
import torch
from tiny_families import ONE_EACH, case_id, make_model, plan_keeping, random_tokens

import prunus
from prunus.calibration import Batch, calibration_from_tokens
from prunus.errors import OptionError, StatisticsError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.repair.compensation import CompensationOptions, compensate_
from prunus.repair.least_squares import NormalEquations
from prunus.repair.reselection import choose_columns, hand_out_scores, reselect
from prunus.scoring.score import ScoringOptions, score
from prunus.selection.plan import Plan
from prunus.selection.select import select
from prunus.statistics import OutputFisher
from prunus.surgery import apply_plan
from prunus.sweep import sweep

DAMPING = 0.05


def rise(x, target, weight, fisher, stay):
    """F-weighted squared error of the best ridge solution on some inputs, with the ridge itself; from the data."""
    ridge = DAMPING * float((x.T @ x).diagonal().mean())
    part = x[:, stay]
    gram = part.T @ part + ridge * torch.eye(len(stay), dtype=x.dtype)
    solution = torch.zeros_like(weight)
    solution[:, stay] = torch.linalg.solve(gram, part.T @ target + ridge * weight[:, stay].T).T
    error = x @ solution.T - target
    moved = solution - weight
    return float(((error @ fisher) * error).sum() + ridge * ((moved.T @ fisher) * moved.T).sum())


def test_elimination_finds_what_trying_every_channel_finds():
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(9, 9, generator=generator).double()
    x = torch.randn(80, 9, generator=generator).double() @ mixing  # correlated inputs
    weight = torch.randn(4, 9, generator=generator).double()
    target = x @ weight.T + 0.3 * torch.randn(80, 4, generator=generator).double()
    root = torch.randn(4, 4, generator=generator).double()
    fisher = root @ root.T
    left = list(range(9))
    equations = NormalEquations((x.T @ x).float(), (x.T @ target).float(), float(target.square().sum()))
    while len(left) > 2:
        rises = [rise(x, target, weight, fisher, [c for c in left if c != gone]) for gone in left]
        left.pop(min(range(len(left)), key=rises.__getitem__))
        assert choose_columns(equations, weight, fisher, len(left), DAMPING).tolist() == left
    plain = choose_columns(equations, weight, torch.eye(4), 4, DAMPING).tolist()
    assert plain != choose_columns(equations, weight, fisher, 4, DAMPING).tolist()


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_output_fisher_is_the_second_moment_of_the_gradient(case):
    model, ids = make_model(*case), random_tokens(3, 7)
    seen = sweep(model, [Batch(ids, None)], [OutputFisher()], progress=False)
    geometry = Geometry.of(model)
    path = geometry.family.block("mlp").output.path
    outputs = []
    handle = model.get_submodule(f"model.layers.1.{path}").register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    model = model.requires_grad_(True)
    log_probabilities = torch.log_softmax(model(ids).logits[:, :-1].float(), dim=-1)
    loss = -log_probabilities.gather(-1, ids[:, 1:, None]).sum()
    (gradient,) = torch.autograd.grad(loss, outputs)
    handle.remove()
    model.requires_grad_(False)
    delta = gradient.double().flatten(0, 1)
    expected = sum(torch.outer(row, row) for row in delta) / len(delta)
    torch.testing.assert_close(seen.layers[1]["output_fisher.mlp"].double(), expected, rtol=1e-4, atol=1e-6)


def plan_of(geometry):
    """A layer with both blocks narrower, and one that keeps its channels."""
    kept = [{"attention": range(1), "mlp": range(0, 20, 2)}, {"attention": range(1), "mlp": range(20)}]
    return plan_keeping(geometry, kept)


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_the_result_is_the_repair_of_the_plan_that_it_finds(case):
    model, batches = make_model(*case), [Batch(ids, None) for ids in random_tokens(12, 12).split(4)]
    geometry = Geometry.of(model)
    plan, options = plan_of(geometry), CompensationOptions(damping=DAMPING)
    statistics = sweep(model, batches, [OutputFisher()], progress=False)
    keep_all = Plan.keep_all(geometry)
    smaller, found, repairs = reselect(model, keep_all, model, plan, statistics, batches, options, progress=False)
    assert found.kept_widths == plan.kept_widths
    assert [kept.attention for kept in found.layers] == [kept.attention for kept in plan.layers]
    expected = apply_plan(model, found)
    again = compensate_(expected, model, found, batches, options, progress=False)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(smaller.state_dict()[name], tensor, rtol=2e-3, atol=2e-4)
    assert [repair.error_after for repair in repairs] == pytest.approx(
        [r.error_after for r in again], rel=1e-3, abs=1e-6
    )
    assert smaller.num_parameters() == geometry.parameters_left(plan.kept_widths)


def test_a_later_round_chooses_among_what_is_left():
    model, batches = make_model("llama", "gqa"), [Batch(ids, None) for ids in random_tokens(12, 12).split(4)]
    geometry = Geometry.of(model)
    done = Plan.from_kept(geometry, [{"attention": [0, 2], "mlp": range(1, 20)}, {"attention": [], "mlp": range(10)}])
    plan = Plan.from_kept(geometry, [{"attention": [2], "mlp": range(1, 8)}, {"attention": [], "mlp": []}])
    before = apply_plan(model, done)
    statistics = sweep(before, batches, [OutputFisher()], progress=False)
    smaller, found, _ = reselect(before, done, model, plan, statistics, batches, CompensationOptions(), progress=False)
    assert found.kept_widths == plan.kept_widths
    assert found.layers[0].attention == (2,)
    assert set(found.layers[0].mlp) < set(range(1, 20))
    assert len(smaller.model.layers) == 1


def test_scores_are_handed_out_so_that_the_budget_leads_to_the_plan():
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(4, 12))
    scored = score(model, calibration, ScoringOptions(method="gate_fisher"), progress=False)
    for ratio in (0.1, 0.3, 0.45):
        plan = select(scored.table, scored.geometry, ratio)
        other = Plan.from_kept(  # as many channels of each layer, but the others
            scored.geometry,
            [{"attention": kept.attention, "mlp": [19 - group for group in kept.mlp]} for kept in plan.layers],
        )
        table = hand_out_scores(scored.table, other)
        assert select(table, scored.geometry, ratio) == other
        assert sorted(table["score"]) == sorted(scored.table["score"])


@pytest.mark.parametrize("reselects", [True, False])
def test_prune_chooses_again_where_it_is_asked_to(reselects):
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(8, 12))
    options, repair = ScoringOptions(method="gate_fisher"), CompensationOptions(reselect=reselects)
    result = prunus.prune(model, 0.3, calibration, scoring=options, compensation=repair, rounds=2, progress=False)
    assert result.score.statistics.has("output_fisher.mlp") == reselects
    geometry = Geometry.of(model)
    assert select(result.score.table, geometry, 0.3) == result.plan
    assert result.model.num_parameters() == geometry.parameters_left(result.plan.kept_widths)
    assert {(r.layer_idx, r.axis) for r in result.repairs} == {
        (i, axis) for i, kept in enumerate(result.plan.layers) for axis in AXES if kept[axis]
    }


def test_without_gradients_there_is_nothing_to_choose_by():
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(8, 12))
    options, repair = ScoringOptions(method="wanda"), CompensationOptions(reselect=True)
    with pytest.raises(OptionError, match="reselect needs gradients, which method wanda does not take"):
        prunus.prune(model, 0.3, calibration, scoring=options, compensation=repair, progress=False)


def test_it_says_what_it_needs():
    model, batches = make_model("llama", "gqa"), [Batch(random_tokens(2, 6), None)]
    geometry = Geometry.of(model)
    statistics = sweep(model, batches, [], progress=False)
    with pytest.raises(StatisticsError, match=r"needs the statistic output_fisher\.mlp of every layer"):
        reselect(model, Plan.keep_all(geometry), model, plan_of(geometry), statistics, batches, CompensationOptions())
