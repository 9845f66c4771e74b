"""Learning rate, measurements and end of a run, by steps and by the clock."""

from __future__ import annotations

import math

import pytest
import torch

from prunus.recovery.pace import FIRST_RATE, Pace


def test_by_steps():
    pace = Pace(10, None, warmup=0.2, decay="cosine", marks=5)
    rates = [pace(step) for step in range(10)]
    # Steps are counted at their middle: the first at 0.05 of the run, a quarter of the way up.
    assert rates[:2] == pytest.approx([0.25, 0.75])
    assert rates[2:] == pytest.approx(
        [
            0.5 * (1 + math.cos(math.pi * (share - 0.2) / 0.8))
            for share in (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
        ]
    )
    assert [step for step in range(1, 11) if pace.passes_mark(step)] == [2, 4, 6, 8, 10]
    assert [pace.is_over(step) for step in (9, 10)] == [False, True]


def test_linear_constant_and_without_warmup():
    assert [Pace(4, None, 0.0, "linear", 1)(step) for step in range(4)] == pytest.approx([0.875, 0.625, 0.375, 0.125])
    assert [Pace(4, None, 0.0, "constant", 1)(step) for step in range(4)] == [1.0] * 4
    assert Pace(10**9, None, 0.1, "linear", 1)(0) == FIRST_RATE, "no step is lost at a rate of nothing"


@pytest.mark.parametrize("per_step", [1.0, 7.0, 40.0])
def test_the_clock_ends_a_run_in_time_and_the_rate_falls_to_nothing_by_then(per_step):
    pace = Pace(None, 100.0, warmup=0.1, decay="linear", marks=4)
    pace.reserved = 3.0
    step, rates, measured = 0, [], []
    while not (step and pace.is_over(step)):
        rates.append(pace(step))
        step += 1
        pace.seconds += per_step
        if pace.passes_mark(step):
            measured.append(step)
    assert pace.seconds + pace.reserved <= 100
    assert pace.seconds + pace.reserved + 2 * per_step > 100, "no time is left for yet another step"
    assert rates[-1] < max(2 * per_step / 97, FIRST_RATE) + 1e-9
    assert measured[-1] == step
    assert len(measured) == min(4, step)


def test_whichever_limit_comes_first():
    pace = Pace(5, 100.0, 0.0, "linear", 1)
    pace.seconds = 10.0
    assert pace.is_over(5)
    pace.seconds = 99.0
    assert pace.is_over(2)
    assert not Pace(5, 100.0, 0.0, "linear", 1).is_over(2)
    # With time enough, all steps are done: the last as well.
    unhurried = Pace(5, 100.0, 0.0, "linear", 1)
    unhurried.seconds = 4.0
    assert [unhurried.is_over(step) for step in (3, 4, 5)] == [False, False, True]


def test_the_clock_is_stored_with_the_scheduler():
    def scheduler(pace):
        return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), pace)

    pace = Pace(None, 100.0, 0.0, "linear", 4)
    stored = scheduler(pace)
    pace.seconds, pace.mark = 42.0, 2
    again = Pace(None, 100.0, 0.0, "linear", 4)
    scheduler(again).load_state_dict(stored.state_dict())
    assert (again.seconds, again.mark) == (42.0, 2)
    assert not again.passes_mark(3), "what was measured is not measured again"
