"""The budget search: what it reports is what independent measurements give, and it goes on where it was killed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_adaptive import mean_loss
from tiny_families import make_model, random_tokens

import prunus.pipeline.budget_search
from prunus.calibration import calibration_from_tokens
from prunus.calibration.self_text import text_for_repair
from prunus.errors import OptionError, PlanError, StatisticsError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.pipeline.budget_search import BudgetSearch, SearchOptions, search_budget
from prunus.pipeline.prune import prune
from prunus.pipeline.rounds import carry_over
from prunus.repair.compensation import CompensationOptions, compensate_
from prunus.scoring.score import Score, ScoringOptions, score
from prunus.selection.select import select
from prunus.selection.table import rank_table
from prunus.surgery import apply_plan

RATIO = 0.2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return make_model("llama", "gqa")


@pytest.fixture(scope="module")
def calibration():
    return calibration_from_tokens(random_tokens(16, 12))


@pytest.fixture(scope="module")
def table(model, calibration):
    return score(model, calibration, ScoringOptions(method="taylor"), progress=False).table


def misjudged(table):
    """A table in which attention looks as if it were worth hardly anything."""
    return rank_table(table, scores=table["score"].where(table["group_type"] != "attention", table["score"] * 1e-4))


@pytest.mark.parametrize("compensation", [None, CompensationOptions()])
def test_the_losses_are_those_of_the_plans(model, calibration, table, compensation):
    wrong, geometry = misjudged(table), Geometry.of(model)
    options = SearchOptions(search_trials=12, search_bands=2)
    found = search_budget(model, wrong, RATIO, calibration, options, compensation=compensation, progress=False)
    fitted, held_out = list(calibration.batches(1))[:2], calibration.input_ids[-2:]

    def by_hand(table):
        plan = select(table, geometry, RATIO)
        smaller = apply_plan(model, plan)
        if compensation:
            compensate_(smaller, model, plan, fitted, CompensationOptions(fit_logits=False), progress=False)
        return mean_loss(smaller, held_out)

    assert found.ranking_loss == pytest.approx(by_hand(wrong), abs=1e-5)
    assert found.loss == pytest.approx(by_hand(found.weigh(wrong)), abs=1e-5)
    assert found.loss <= found.ranking_loss


def test_a_round_over_all_units_takes_the_better_direction_or_none(model, calibration, table):
    """Against a walk by hand over the same moves."""
    geometry, held_out = Geometry.of(model), calibration.input_ids[-2:]
    layers = len(geometry.widths)
    losses = {}

    def loss(factors):
        weights = [factors[row.group_type, row.layer_idx] for row in table.itertuples()]
        plan = select(rank_table(table, scores=table["score"] * weights), geometry, RATIO)
        return losses.setdefault(plan.fingerprint, mean_loss(apply_plan(model, plan), held_out))

    factors = {(axis, layer): 1.0 for axis in AXES for layer in range(layers)}
    best = loss(factors)
    for step in (2, 2**0.5, 2**0.25):
        for axis in AXES:
            for layer in range(layers):
                for move in (step, 1 / step):
                    tried = {**factors, (axis, layer): factors[axis, layer] * move}
                    if loss(tried) < best - 1e-3:
                        best, factors = loss(tried), tried
                        break
    options = SearchOptions(search_trials=10_000, search_bands=layers)
    found = search_budget(model, table, RATIO, calibration, options, progress=False)
    for axis in AXES:
        assert found.factors[axis] == pytest.approx([factors[axis, layer] for layer in range(layers)])
    assert found.loss == pytest.approx(best, abs=1e-5)
    assert found.trials == len(losses)
    assert len(set(factors.values())) > 1


def test_limits_end_it(model, calibration, table, monkeypatch):
    few = search_budget(model, table, RATIO, calibration, SearchOptions(search_trials=3), progress=False)
    assert few.trials == 3
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(prunus.pipeline.budget_search.time, "perf_counter", lambda: next(clock))
    timed = search_budget(model, table, RATIO, calibration, SearchOptions(search_minutes=2), progress=False)
    assert (timed.trials, timed.seconds) == (4, 120)


def test_a_killed_search_goes_on(model, calibration, table, tmp_path, monkeypatch):
    options = SearchOptions(search_trials=9, search_bands=2)
    search = lambda work: search_budget(model, table, RATIO, calibration, options, work=work, progress=False)  # noqa: E731
    undisturbed = search(None)
    measured, real = [], prunus.pipeline.budget_search.apply_plan

    def killed_at_the_fifth(model, plan):
        measured.append(plan.fingerprint)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return real(model, plan)

    monkeypatch.setattr(prunus.pipeline.budget_search, "apply_plan", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "search")
    again = search(tmp_path / "search")
    assert (again.factors, again.loss, again.trials) == (undisturbed.factors, undisturbed.loss, undisturbed.trials)
    assert len(measured) == 9 + 1
    assert measured[4] == measured[5]


def test_work_of_other_inputs_is_refused(model, calibration, table, tmp_path):
    options = SearchOptions(search_trials=2)
    search_budget(model, table, RATIO, calibration, options, work=tmp_path, progress=False)
    with pytest.raises(StatisticsError, match="compensation"):
        search_budget(
            *(model, table, RATIO, calibration, options),
            compensation=CompensationOptions(),
            work=tmp_path,
            progress=False,
        )


def test_prune_searches_once_and_every_round_goes_by_it(model, calibration, tmp_path):
    options, scoring = SearchOptions(search_trials=30, search_bands=2), ScoringOptions(method="taylor")
    settings = {"scoring": scoring, "rounds": 2, "progress": False}
    result = prune(model, RATIO, calibration, search=options, **settings)
    found = result.score.about["budget_search"]
    assert found["loss"] < found["ranking_loss"]
    assert result.plan != prune(model, RATIO, calibration, **settings).plan
    assert select(result.score.table, result.score.geometry, RATIO) == result.plan
    # The second round by hand: the scores of what the first one left, times the factors of the layers that are left.
    first = prune(model, RATIO / 2, calibration, scoring=scoring, search=options, progress=False)
    assert first.score.about["budget_search"] != found, "the search is for the whole ratio"
    geometry = Geometry.of(model)
    search = BudgetSearch(**found)
    weighed = search.weigh(score(model, calibration, scoring, progress=False).table)
    half = select(weighed, geometry, RATIO / 2)
    later = score(apply_plan(model, half), calibration.split(8)[0], scoring, progress=False).table
    table = carry_over(weighed, half, search.weigh(later))
    assert select(table, geometry, RATIO) == result.plan


def test_plans_are_measured_on_the_text_of_the_repair(model, calibration):
    options, repair = SearchOptions(search_trials=6, search_bands=1), CompensationOptions(self_text=0.5)
    scoring = ScoringOptions(method="taylor")
    found = prune(model, RATIO, calibration, scoring=scoring, compensation=repair, search=options, progress=False)
    losses = []
    for text in (text_for_repair(model, calibration, repair, seed=scoring.random_seed, progress=False), calibration):
        table = score(model, calibration, scoring, progress=False).table
        alone = search_budget(model, table, RATIO, text, options, compensation=repair, progress=False)
        losses.append((alone.ranking_loss, alone.loss))
    about = found.score.about["budget_search"]
    assert losses[0] == (about["ranking_loss"], about["loss"]) != losses[1]


def test_padding_does_not_count(model, calibration, table):
    ids, options = calibration.input_ids, SearchOptions(search_trials=3, search_bands=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :4])], dim=1)
    padded = calibration_from_tokens(torch.cat([ids, random_tokens(16, 4)], dim=1), mask)
    found, expected = (
        search_budget(model, table, RATIO, each, options, progress=False) for each in (padded, calibration)
    )
    assert found.ranking_loss == pytest.approx(expected.ranking_loss, rel=1e-5)


def test_what_is_saved_can_be_ranked_again(model, calibration, tmp_path):
    options = SearchOptions(search_trials=30, search_bands=2)
    result = prune(model, RATIO, calibration, search=options, progress=False)
    result.score.save(tmp_path)
    loaded = Score.load(tmp_path)
    assert set(loaded.about["budget_search"]["factors"]["mlp"]) != {1.0}
    assert select(loaded.ranked("none").table, loaded.geometry, RATIO) == result.plan


@pytest.mark.parametrize("factors", [3, {"mlp": 2}, {"mlp": [1.0]}, {"attention": ["a", "b"]}, {"mlp": [None] * 2}])
def test_damaged_factors_are_named(model, calibration, factors):
    result = prune(model, RATIO, calibration, search=SearchOptions(search_trials=2), progress=False)
    damaged = replace(result.score, about={**result.score.about, "budget_search": {"factors": factors}})
    with pytest.raises(PlanError, match="how they were weighed"):
        damaged.ranked("none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"search_trials": 1}, "search_trials is 1"),
        ({"search_minutes": 0.0}, "search_minutes is 0"),
        ({"search_minutes": float("nan")}, "search_minutes is nan"),
        ({"search_trials": 4, "search_bands": 0}, "search_bands is 0"),
    ],
)
def test_impossible_options(arguments, message):
    with pytest.raises(OptionError, match=message):
        SearchOptions(**arguments)


def test_it_is_refused_before_any_pass(model):
    one = calibration_from_tokens(random_tokens(1, 12))
    search = SearchOptions(search_trials=4)
    with pytest.raises(OptionError, match="has 1 calibration sequences"):
        prune(model, RATIO, one, search=search)
    with pytest.raises(OptionError, match="has 0 calibration sequences"):
        prune(model, RATIO, scoring=ScoringOptions(method="magnitude"), search=search)
    with pytest.raises(OptionError, match="zscore"):
        prune(
            model,
            RATIO,
            calibration_from_tokens(random_tokens(4, 12)),
            scoring=ScoringOptions(normalize="zscore"),
            search=search,
        )
