"""Results in benchmarks/results load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prunus.report import write_report
from prunus.selection.plan import Plan

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("plan*.json")), ids=lambda path: path.stem)
def test_plans(path):
    plan = Plan.load(path)
    assert json.loads(plan.to_json()) == json.loads(path.read_text())


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("comparison.json")), ids=lambda path: path.parent.name)
def test_comparisons(path, tmp_path):
    shutil.copytree(path.parent, tmp_path / "comparison")
    assert write_report(tmp_path / "comparison").stat().st_size > 10_000
