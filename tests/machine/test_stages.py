"""Stages: what is said of them, on a terminal and without one, and what they are measured to take."""

from __future__ import annotations

import sys
import time

import pytest

from prunus.machine import metering, stages
from prunus.machine.bars import Bar, innermost, tracked
from prunus.machine.stages import Stages, show_seconds


def test_a_line_per_stage_with_its_share(capsys):
    job = Stages(["loading", "scoring"])
    with job.enter("loading"):
        time.sleep(0.01)
    with job.enter("scoring"), job.enter("a part"):
        pass
    assert capsys.readouterr().err.splitlines() == ["1 of 2: loading", "2 of 2: scoring", "  a part"]
    assert list(job.costs) == ["loading", "scoring"]
    assert 0.01 <= job.costs["loading"].seconds < 1
    assert "scoring" in job
    assert "a part" not in job
    with pytest.raises(ValueError, match="saving"), job.enter("saving"):
        pass


def test_time_left_at_the_pace_so_far(capsys, monkeypatch):
    """Loading was to take 10 s and took 20: of 100 s that are ahead 200 are left."""
    for loading, left in ((10.0, "3 min"), (5.0, "2 min")):  # 5 of 105 s are too little to tell
        job = Stages({"loading": loading, "scoring": 60.0, "saving": 40.0})
        with job.enter("loading"):
            pass
        job.costs["loading"].seconds = 2 * loading
        with job.enter("scoring"):
            pass
        said = ["1 of 3: loading, 2 min left", f"2 of 3: scoring, {left} left"]
        assert capsys.readouterr().err.splitlines() == said


def test_without_progress_nothing_is_said(capsys):
    with Stages(["loading"], progress=False).enter("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(stages, "BETWEEN_LINES", 0.05)
    with Stages(["scoring"]).enter("scoring"):
        time.sleep(0.12)
        with Bar("perplexity", total=8, unit="window") as bar:
            assert innermost() is bar
            bar.update(2)
            time.sleep(0.12)
        assert innermost() is None
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "1 of 1: scoring"
    assert others[0] == "scoring: since 1 s"
    assert any(line.startswith("scoring, perplexity: 2 of 8, 1 s left") for line in others)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_bars_say_it(capsys, monkeypatch):
    monkeypatch.setattr(stages, "BETWEEN_LINES", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Stages(["scoring"]).enter("scoring"):
        time.sleep(0.05)
    assert capsys.readouterr().err == "1 of 1: scoring\n"


def test_bars_count_what_was_worked_on_and_not_what_an_earlier_run_did():
    seen = []
    for item in tracked("abc", "letters", total=3, unit="letter"):
        bar = innermost()
        seen.append((item, bar.done, bar.seconds_left is None))
    assert seen == [("a", 0, True), ("b", 1, False), ("c", 2, False)]
    with Bar("layers", total=10, unit="layer") as bar:
        bar.resume(8)
        assert bar.seconds_left is None
        time.sleep(0.02)
        bar.update()
        assert 0.02 <= bar.seconds_left < 0.2


def test_the_peak_of_a_part_does_not_hide_that_of_the_whole(monkeypatch):
    """A high-water mark that each meter resets, as Linux and CUDA have it."""
    memory = {"peak": 0}
    monkeypatch.setattr(metering, "_peak", lambda device: memory["peak"])
    monkeypatch.setattr(metering, "_reset_peak", lambda device: memory.update(peak=1))
    with metering.metered() as whole:
        memory["peak"] = 50
        with metering.metered() as first:
            memory["peak"] = 20
        with metering.metered() as second:
            memory["peak"] = 30
    assert (whole.peak_bytes, first.peak_bytes, second.peak_bytes) == (50, 20, 30)
    with metering.metered() as whole:
        memory["peak"] = 10
        with metering.metered():
            memory["peak"] = 40
    assert whole.peak_bytes == 40


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "1 s"), (59.6, "60 s"), (99, "99 s"), (170, "3 min"), (5900, "98 min"), (7500, "2 h 5 min")],
)
def test_times_for_people(seconds, shown):
    assert show_seconds(seconds) == shown
