"""A slice of the fuzz run, and that the fuzz run finds what it is for."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

from prunus.errors import CheckpointError

#: kinds that are read without training; `make fuzz` runs all, thousands of times
QUICK = [name for name in fuzz.KINDS if not name.startswith(("recovery", "trainer"))]


@pytest.mark.slow
def test_a_slice(tmp_path):
    tally = fuzz.fuzz(40, seed=7, kinds=QUICK, place=tmp_path, whole_files=False)
    assert tally.cases.total() >= 36
    assert not tally.findings, tally.findings
    assert 0 < tally.refused.total() < tally.cases.total()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda *_: 1 / 0, "traceback"),
        (lambda *_: fuzz.time.sleep(60), "hang"),
        (lambda *_: all(number == 0 for number in iter(int, 1)), "hang"),
        (lambda *_: 2, "no message"),
    ],
    ids=["traceback", "sleeps", "loops", "no message"],
)
def test_faults_are_found(tmp_path, monkeypatch, fault, found):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "plan.json").write_text("{}")
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "main", fault)
    finding, refused, _ = fuzz.run_case("plan", 0, 0, tmp_path / "whole", tmp_path)
    assert finding is not None
    assert (finding.what, refused) == (found, False)


def test_wrong_results_and_leftovers_are_found(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "plan.json").write_text("{}")

    def wrong(case):
        raise CheckpointError("config and tensors differ")

    monkeypatch.setitem(fuzz.KINDS, "plan", fuzz.Kind("plan.json", ["apply", "OUT"], holds=wrong))
    monkeypatch.setattr(fuzz, "main", lambda words: 0)
    assert fuzz.run_case("plan", 0, 0, tmp_path / "whole", tmp_path)[0].what == "wrong result"

    def leaves(words):
        Path(words[-1]).mkdir()
        print("error: no", file=fuzz.sys.stderr)
        return 1

    monkeypatch.setattr(fuzz, "main", leaves)
    assert fuzz.run_case("plan", 0, 0, tmp_path / "whole", tmp_path)[0].what == "left behind"
