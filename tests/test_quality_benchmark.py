"""The quality benchmark goes on where it stopped, and its rows are those of the commands."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tiny_folder import TEXT

import prunus

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quality"]


@pytest.fixture
def words(folder, text, tmp_path):
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(TEXT.replace("fox", "cat"), encoding="utf-8")
    task = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 0}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.jsonl").write_text(json.dumps(task) + "\n")
    return [
        *("--model", folder, "--calibration", calibration, "--text", text, "--tasks", tmp_path / "tasks"),
        *("--samples", "8", "--seq-len", "24", "--eval-seq-len", "32", "--windows", "3", "--ratios", "0.2"),
        *("--seeds", "0", "--recipes"),
        "default recipe;taylor_2nd;taylor;wanda, layer_sum;wanda, layer_sum, repaired;default recipe, budget searched;"
        "default recipe, reselected",
        *("--out", tmp_path / "out"),
    ]


def test_rows_and_going_on(quality, folder, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, words)])
    quality.main()
    path = tmp_path / "out" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ["dense", "default recipe", "default recipe, budget searched", "default recipe, reselected"]
    names += ["taylor", "taylor_2nd"]
    assert [row["recipe"] for row in rows] == [*names, "wanda, layer_sum, repaired", "wanda, layer_sum"]
    assert all(rows[number]["zero_shot"][0]["task"] == "piqa" for number in (0, 1, 4))
    assert rows[2]["budget_search"]["trials"] > 1
    assert ("same_plan_as" in rows[5]) == (rows[4]["plan"] == rows[5]["plan"])

    model, tokenizer = prunus.load_model(folder)
    calibration = prunus.load_calibration(str(tmp_path / "calibration.txt"), tokenizer, samples=8, seq_len=24, seed=0)
    options = prunus.ScoringOptions(method="taylor", batch_size=2)
    result = prunus.prune(model, 0.2, calibration, scoring=options, progress=False)
    expected = prunus.perplexity(result.model, tokenizer, TEXT, seq_len=32, max_windows=3, progress=False)
    assert rows[4]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert rows[4]["plan"] == result.plan.fingerprint

    # A run that was cut off keeps its rows, and makes only those that are missing.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    quality.main()
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[:3] == rows[:3]
    assert [row["perplexity"] for row in again] == pytest.approx([row["perplexity"] for row in rows])
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"{rows[2]['perplexity'] / rows[0]['perplexity']:,.2f}" in table
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000
