"""The same input gives the same plan every time, and a plan survives being written down."""

from __future__ import annotations

import json

import pytest
import torch
from cut_cases import CUTS, METHODS, Tiny, half, sweep_for
from tiny_families import ONE_UNLIKE, case_id

from prunus.importance import score_groups
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan


def test_plan_round_trip(tiny, axes, tmp_path):
    plan = tiny.plan(axes)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.fingerprint == plan.fingerprint
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    again.check_fits(tiny.geometry)


def test_a_plan_is_enough_to_redo_the_cut(tiny, axes):
    plan = Plan.from_dict(json.loads(tiny.plan(axes).to_json()))
    redone, expected = apply_plan(tiny.model, plan).state_dict(), tiny.pruned(axes).state_dict()
    assert redone.keys() == expected.keys()
    assert all(torch.equal(redone[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", [ONE_UNLIKE[0], ONE_UNLIKE[-1]], ids=case_id)
def test_the_same_seed_gives_the_same_plan(case, method):
    """All of it made again, with a sweep that takes nothing but what this method needs."""
    tiny = Tiny(*case)
    statistics = sweep_for(tiny, [method]) if METHODS[method].needs else None
    importance = score_groups(tiny.model, METHODS[method], statistics)
    for ours, shared in zip(importance, tiny.importance(method), strict=True):
        for axis, values in ours.items():
            # Taking squares as well, the sweep multiplies one sequence at a time: equal but for rounding.
            torch.testing.assert_close(values, shared[axis], rtol=1e-4, atol=1e-9)
    repeated = sweep_for(tiny, [method]) if METHODS[method].needs else None
    again = score_groups(tiny.model, METHODS[method], repeated)
    for axes in CUTS:
        assert half(tiny, axes, method, again) == half(tiny, axes, method, importance)
